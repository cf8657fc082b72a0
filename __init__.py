"""ComfyUI Nested Attention: put your subject into an SDXL picture, bound to one word of the prompt."""

from comfy_api.v0_0_2 import ComfyExtension, io

from .nodes import NODES
from .nodes.folders import register_folders
from .nodes.health import serve_health
from .nodes.templates import order_templates

WEB_DIRECTORY = "./web"

register_folders()


class NestedAttentionExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES

    async def on_load(self) -> None:
        serve_health()
        order_templates()


async def comfy_entrypoint() -> NestedAttentionExtension:
    return NestedAttentionExtension()
