"""The ASGI application: which endpoint answers which path. Any ASGI server may run it; `life` runs it under uvicorn."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from internvl_rt.server import chat, completions, decisions, models, responses, tokens
from internvl_rt.server.fault import ApiError
from internvl_rt.server.gate import PROBES, Endpoint, Handler
from internvl_rt.server.options import ServerOptions
from internvl_rt.server.page import page_files
from internvl_rt.server.protocol import encode
from internvl_rt.server.service import Service

WORK: dict[str, Handler[Service]] = {
    "/v1/chat/completions": chat.chat,
    "/v1/completions": completions.completions,
    "/v1/responses": responses.responses,
    "/v1/decisions": decisions.decisions,
    "/tokenize": tokens.tokenize,
    "/detokenize": tokens.detokenize,
}
_READS: dict[str, Handler[Service]] = {
    "/v1/models": models.models,
    "/v1/models/{name:path}": models.model,
    "/version": models.show_version,
    "/metrics": models.metrics,
}
_OPEN: dict[str, Handler[Service]] = dict(zip(PROBES, (models.health, models.ready), strict=True))


def build_app(service: Service) -> Starlette:
    """Builds the application for one service, which is closed with it."""

    def route(path: str, handler: Handler[Service], method: str = "GET", *, needs_key: bool = True) -> Route:
        endpoint = Endpoint(service, handler, needs_key=needs_key, is_work=method == "POST")
        return Route(path, endpoint, methods=[method])

    routes = [route(path, handler, "POST") for path, handler in WORK.items()]
    routes += [route(path, handler) for path, handler in _READS.items()]
    routes += [route(path, handler, needs_key=False) for path, handler in _OPEN.items()]
    if service.options.page:
        routes += [route(path, handler, needs_key=False) for path, handler in page_files()]

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await service.end_calls(service.options.drain_s)
            await service.engine.close()

    app = Starlette(
        routes=routes,
        middleware=middleware_of(service.options),
        lifespan=lifespan,
        exception_handlers={HTTPException: _no_route},
    )
    app.router.redirect_slashes = False  # a redirect would lead to whatever host the request names
    return app


def middleware_of(options: ServerOptions) -> list[Middleware]:
    """Returns what lets web pages of other origins use a server, if there are any."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=options.allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", "x-request-id", "x-internvl-rt-timings"],
        expose_headers=["x-request-id", "retry-after", "retry-after-ms", "x-internvl-rt-timings"],
    )
    return [cors] if options.allowed_origins else []


async def _no_route(request: Request, error: Exception) -> Response:
    """Answers for a path or a method that nothing serves."""
    assert isinstance(error, HTTPException)
    is_method = error.status_code == 405
    what = f"{request.method} is not served here" if is_method else "this path is not served; the interface is at /v1"
    fault = ApiError(error.status_code, what, "method_not_allowed" if is_method else "not_found")
    return Response(encode(fault.body()), error.status_code, error.headers, "application/json")
