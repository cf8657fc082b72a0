"""Makes ComfyUI's own loaders open the small world's files: link this folder into `custom_nodes`.

Nested Attention itself needs none of this; the quickstart and the tests do. One node is added, decoupled
attention as the evaluation compares with it.
"""

from comfy_api.v0_0_2 import ComfyExtension, io

from .baseline import DecoupledSubject
from .host import register

register()


class SmallWorldExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [DecoupledSubject]


async def comfy_entrypoint() -> SmallWorldExtension:
    return SmallWorldExtension()
