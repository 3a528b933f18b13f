"""Files of `torch.save` made by hand: a zip archive of which any field can be wrong, and a pickle of any operations."""

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest

from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.errors import CheckpointError

Content = bytes | int  # a number is a hole of so many bytes
Changes = dict[tuple[str, str], Any]


def write_zip(file: Path, entries: list[tuple[str, Content]], changes: Changes | None = None) -> None:
    """Writes entries by name as torch does.

    changes: other values of the fields of a record, {(record, name or ""): {field: value}}, and other extra fields.
    """
    changed = changes or {}
    listed = []

    def record(kind: str, name: str, layout: str, **fields: Any) -> bytes:
        return struct.pack(layout, *(fields | changed.get((kind, name), {})).values())

    with file.open("wb") as stream:
        for name, content in entries:
            size, at, raw = content if isinstance(content, int) else len(content), stream.tell(), name.encode()
            head = {"needed": 0, "flags": 0x808, "method": 0, "time": 0, "date": 0, "crc": 0}
            sizes = {"packed": 0, "size": 0, "name_len": len(raw), "extra_len": 0}
            stream.write(record("local", name, "<4s5H3I2H", sign=b"PK\3\4", **head, **sizes) + raw)
            if isinstance(content, int):
                stream.seek(content, os.SEEK_CUR)
            else:
                stream.write(content)
            wide = [size, size] * (size >= 0xFFFF_FFFF) + [at] * (at >= 0xFFFF_FFFF)
            extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
            extra = changed.get(("extra", name), extra)
            sizes |= {"packed": min(size, 0xFFFF_FFFF), "size": min(size, 0xFFFF_FFFF), "extra_len": len(extra)}
            tail = {"comment_len": 0, "disk": 0, "inner": 0, "outer": 0, "header": min(at, 0xFFFF_FFFF)}
            line = record("listed", name, "<4s6H3I5H2I", sign=b"PK\1\2", made=0, **head, **sizes, **tail)
            listed.append(line + raw + extra)
        begin = stream.tell()
        stream.write(b"".join(listed))
        end, num = stream.tell(), len(entries)
        few = {"here": min(num, 0xFFFF), "count": min(num, 0xFFFF)}
        many = {"here": num, "count": num, "length": end - begin, "begin": begin}
        disks = {"disk": 0, "first": 0}
        stream.write(record("end_64", "", "<4sQ2H2I4Q", sign=b"PK\6\6", rest=44, made=0, needed=0, **disks, **many))
        stream.write(record("locator", "", "<4sIQI", sign=b"PK\6\7", disk=0, end=end, disks=1))
        where = {"length": end - begin, "begin": min(begin, 0xFFFF_FFFF), "comment_len": 0}
        stream.write(record("end", "", "<4s4H2IH", sign=b"PK\5\6", **disks, **few, **where))


def write_program(folder: Path, operations: bytes, data: Content = 24, **more: bytes) -> None:
    """Writes pytorch_model.bin with a pickle and one storage, by default of 24 bytes; more: other entries."""
    entries: list[tuple[str, Content]] = [("m/data.pkl", b"\x80\x02" + operations + b"."), ("m/data/0", data)]
    write_zip(folder / "pytorch_model.bin", [*entries, *more.items()])


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def plain(value: Any) -> bytes:
    """Returns the operations that make a number or a nested tuple of numbers."""
    return b"(" + b"".join(map(plain, value)) + b"t" if isinstance(value, tuple) else pickle.dumps(value, 2)[2:-1]


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def storage(key: str = "0", kind: str = "FloatStorage", num_elements: int | None = 6, module: str = "torch") -> bytes:
    return b"(" + text("storage") + name(module, kind) + text(key) + text("cpu") + plain(num_elements) + b"tQ"


def tensor(
    stored: bytes | None = None,
    offset: int = 0,
    shape: Any = (2, 3),
    strides: Any = (3, 1),
    *,
    hooks: bytes = b"}",
    end: bytes = b"",
    call: str = "_rebuild_tensor_v2",
) -> bytes:
    """Returns the call that makes a tensor; a shape or strides given as bytes are operations."""
    numbers = b"".join(one if isinstance(one, bytes) else plain(one) for one in (offset, shape, strides))
    return name("torch._utils", call) + b"(" + (stored or storage()) + numbers + b"\x89" + hooks + end + b"tR"


def state(*pairs: tuple[str | bytes, bytes]) -> bytes:
    """Returns a dict of names, or other keys as operations, to values as operations."""
    return b"}(" + b"".join((text(key) if isinstance(key, str) else key) + value for key, value in pairs) + b"u"


def read_refusal(folder: Path) -> str:
    """Returns the text of the error with which a folder is refused: one short line that names the folder."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert message.isprintable()
    assert len(message) < 1200 + len(str(folder))
    return message
