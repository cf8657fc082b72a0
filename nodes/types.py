"""The pack's own socket types. Their names are public: other packs and shared workflows use them."""

from comfy_api.v0_0_2 import io

NestedEncoder = io.Custom("NESTED_ENCODER")
NestedSubject = io.Custom("NESTED_SUBJECT")
NestedRecording = io.Custom("NESTED_RECORDING")
NestedGrid = io.Custom("NESTED_GRID")
#: The host's own type, by name: hosts that have no face landmarker simply have nothing to connect.
FaceLandmarks = io.Custom("FACE_LANDMARKS")

CATEGORY = "Nested Attention"
