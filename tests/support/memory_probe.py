"""How much memory the Python objects of an API server take, asked from outside.

``vllm serve --middleware tests.support.memory_probe.MemoryProbe`` counts every allocation of the
process from then on, and answers ``GET /traced-bytes`` with their sum after a garbage collection.
"""

import gc
import tracemalloc

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

PATH = "/traced-bytes"
MIDDLEWARE = "tests.support.memory_probe.MemoryProbe"


class MemoryProbe:
    """Adds one route to any application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        tracemalloc.start()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") != PATH:
            await self._app(scope, receive, send)
            return
        gc.collect()
        answer = PlainTextResponse(str(tracemalloc.get_traced_memory()[0]))
        await answer(scope, receive, send)
