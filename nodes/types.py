"""The pack's own socket types. Their names are public: other packs and shared workflows use them."""

from comfy_api.v0_0_2 import io

NestedEncoder = io.Custom("NESTED_ENCODER")
NestedSubject = io.Custom("NESTED_SUBJECT")
NestedRecording = io.Custom("NESTED_RECORDING")
NestedGrid = io.Custom("NESTED_GRID")
#: The host's own type, by name: hosts that have no face landmarker simply have nothing to connect.
FaceLandmarks = io.Custom("FACE_LANDMARKS")

CATEGORY = "Nested Attention"


def window_inputs(start: str, end: str) -> list[io.Float.Input]:
    """start_percent and end_percent, a part of the sampling, with these tooltips."""
    return [
        io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, tooltip=start),
        io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=end),
    ]
