"""The order of the pack's templates in the template browser: that in which they are to be read."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable

from aiohttp import web
from server import PromptServer

_PACK = os.path.basename(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_ROUTES = ("/workflow_templates", "/api/workflow_templates")
ORDER = (
    *("first_portrait", "portrait_by_hand", "two_subjects", "several_views", "save_subject", "reuse_subject"),
    *("regional_masks", "controlnet_and_lora", "inpaint_face", "who_is_where", "strength_identity_grid"),
    "check_encoder",
)


def order_templates() -> None:
    """Has the host's server list our templates in order, where there is one.

    The host lists files as its file system does, and the frontend shows them as the host lists them. Other packs' lists
    stay as they are.
    """
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.app.middlewares.append(_in_order)


@web.middleware
async def _in_order(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    response = await handler(request)
    if request.path not in _ROUTES or not isinstance(response, web.Response) or not response.text:
        return response
    listed = json.loads(response.text)
    if _PACK in listed:
        listed[_PACK].sort(key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
        response.text = json.dumps(listed)
    return response
