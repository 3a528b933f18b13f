"""The page at /: plain files of the package, read once and sent with headers that let it talk to this server alone."""

from collections.abc import Iterator
from pathlib import Path

from internvl_rt.server.call import Call
from internvl_rt.server.gate import Handler
from internvl_rt.server.service import Service

FOLDER = Path(__file__).with_name("page")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_files() -> Iterator[tuple[str, Handler[Service]]]:
    """Yields each path of the page, and what answers it."""
    for file in sorted(FOLDER.iterdir()):
        if file.suffix in _TYPES:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            yield path, _sender(file.read_bytes(), _TYPES[file.suffix])


def _sender(content: bytes, content_type: str) -> Handler[Service]:
    async def send(service: Service, call: Call) -> None:
        await call.answer(content, content_type, headers=_HEADERS)

    return send
