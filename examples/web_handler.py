"""Streams answers about uploaded pictures, with internvl-rt[server]; `python examples/web_handler.py MODEL` starts it.

curl -N --data-binary @page.png 'http://127.0.0.1:8000/ask/What%20is%20the%20total%3F'
"""

import sys

import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from internvl_rt import AsyncEngine, InternVLError, QueueFullError


def build_app(model: str = "tiny", limit: int = 20_000_000) -> Starlette:  # limit: bytes of a picture
    async def ask(request):
        if "transfer-encoding" in request.headers or int(request.headers.get("content-length", limit + 1)) > limit:
            return PlainTextResponse(f"send at most {limit:,} bytes, in one piece with their Content-Length", 413)
        content = [{"type": "image", "image": await request.body()}, {"type": "text", "text": request.path_params["q"]}]
        pieces = engine.stream([{"role": "user", "content": content}], timeout_s=60)
        try:
            first = await anext(pieces)  # before the status is sent, so that an error can have its own
        except InternVLError as error:
            return PlainTextResponse(str(error), 503 if isinstance(error, QueueFullError | RuntimeError) else 400)

        async def texts():
            yield first.text
            async for piece in pieces:
                yield piece.text

        return StreamingResponse(texts(), media_type="text/plain")

    engine = AsyncEngine.from_pretrained(model)
    return Starlette(routes=[Route("/ask/{q:path}", ask, methods=["POST"])])


if __name__ == "__main__":
    uvicorn.run(build_app(*sys.argv[1:2]), port=8000)
