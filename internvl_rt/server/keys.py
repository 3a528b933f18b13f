"""API keys: kept as hashes, compared in constant time, and each a tenant of its own."""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from internvl_rt.errors import RequestError, quoted

MAX_FILE_BYTES = 1 << 20
MIN_KEY, MAX_KEY = 8, 512  # characters


class Keys:
    """The keys of one server; with none of them every request is let in."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def tenant(self, given: str) -> str | None:
        """Returns a name for the owner of a key, from which the key cannot be told; None for one that is not known.

        It takes the same time for any key of one length.
        """
        digest = hashlib.sha256(given.encode("utf-8", "replace")).digest()
        known = [hmac.compare_digest(digest, each) for each in self._digests]
        return hashlib.sha256(b"tenant" + digest).hexdigest()[:32] if any(known) else None


def read_keys(path: str | None) -> Keys:
    """Reads a file with a key a line; empty lines and those that begin with # are skipped. Raises RequestError."""
    if path is None:
        return Keys(())
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise RequestError(f"api_keys_file: {quoted(path)} has more than {MAX_FILE_BYTES:,} bytes; one key a line")
        lines = [line.strip() for line in content.decode("ascii").splitlines()]
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        reason = error.strerror if isinstance(error, OSError) else "it is not plain ASCII text"
        raise RequestError(f"api_keys_file: {quoted(path)} cannot be read: {reason}; give a file of keys") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    wrong = next((number for number, key in enumerate(keys, 1) if not MIN_KEY <= len(key) <= MAX_KEY), None)
    if wrong or not keys:
        what = f"key {wrong} has not {MIN_KEY} to {MAX_KEY} characters" if wrong else "it has no key"
        raise RequestError(f"api_keys_file: {quoted(path)}: {what}; write one key a line")
    return Keys(keys)
