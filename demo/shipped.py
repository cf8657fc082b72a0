"""The small world's shipped files: where they lie and what they are called, here and in ComfyUI's folders."""

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"
CHECKPOINT = "small_world.safetensors"
VISION = "small_world_vision.safetensors"
ENCODER = "small_world_nested.safetensors"
PROBE = "small_world_probe.safetensors"
CONTROLNET = "small_world_edges_controlnet.safetensors"
LORA = "small_world_night_lora.safetensors"
