"""Digests of pictures and identities of prompts: cached results are reused for equal inputs alone."""

import hashlib

IDENTITY_VERSION = b"1"  # changes when the content of a KV cache block or its digest changes its meaning


def content_digest(kind: str, details: str, content: bytes | memoryview) -> bytes:
    """Returns 32 bytes: SHA-256 of a picture's content and of the details that its tiles also depend on."""
    head = f"{kind} {details} ".encode()
    return hashlib.sha256(len(head).to_bytes(8, "little") + head + hashlib.sha256(content).digest()).digest()


def build_identity(**parts: str | int | float | bytes | None) -> bytes:
    """Joins all that a prompt's keys and values depend on, besides its tokens and pictures, to one string.

    Every part is written with its type and its length, so that two different sets of parts never give the same string.
    """
    fields = [IDENTITY_VERSION]
    for name, value in sorted(parts.items()):
        fields += [name.encode(), type(value).__name__.encode()]
        fields.append(value if isinstance(value, bytes) else repr(value).encode())
    return b"".join(len(field).to_bytes(8, "little") + field for field in fields)
