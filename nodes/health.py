"""The health check's address: what a bug report needs to say, as plain text."""

from __future__ import annotations

from aiohttp import web
from server import PromptServer

from ..nested_core.health import ROUTE
from ..nested_core.hosts.comfy.health import account


def serve_health() -> None:
    """Adds the address to the host's server, where there is one: the host can be imported without."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get(ROUTE)(_health)


async def _health(request: web.Request) -> web.Response:
    return web.Response(text=account())
