"""Serves a model over HTTP in OpenAI's form: one process, one engine, streams, limits and metrics."""

from importlib.util import find_spec

from internvl_rt.errors import RequestError


def check_libraries(what: str) -> None:
    """Raises RequestError if a library is missing that serving needs. what: needs it, for the message."""
    for name in ("httptools", "msgspec", "prometheus_client", "pybase64", "starlette", "uvicorn", "uvloop"):
        if find_spec(name) is None:
            raise RequestError(f"{what} needs {name}, which is not installed; pip install 'internvl-rt[server]'")
