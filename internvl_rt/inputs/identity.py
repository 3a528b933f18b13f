"""Digests of pictures and identities of prompts, so that what was computed is reused for equal inputs alone."""

import hashlib

IDENTITY_VERSION = b"1"  # counts the meanings that a block of the KV cache and its digest have had


def content_digest(kind: str, details: str, content: bytes | memoryview) -> bytes:
    """SHA-256 of a picture's content and of all that its tiles depend on besides; 32 bytes."""
    head = f"{kind} {details} ".encode()
    return hashlib.sha256(len(head).to_bytes(8, "little") + head + hashlib.sha256(content).digest()).digest()


def build_identity(**parts: str | int | float | bytes | None) -> bytes:
    """One string of all that a prompt's keys and values depend on besides its tokens and pictures.

    Every part is written with its type and its length, so that two different sets of parts never give the same string.
    """
    fields = [IDENTITY_VERSION]
    for name, value in sorted(parts.items()):
        fields += [name.encode(), type(value).__name__.encode()]
        fields.append(value if isinstance(value, bytes) else repr(value).encode())
    return b"".join(len(field).to_bytes(8, "little") + field for field in fields)
