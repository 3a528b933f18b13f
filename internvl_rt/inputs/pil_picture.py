"""Takes Pillow pictures that belong to a caller: any thread may, at the same time, and the caller's stays as it is.

Pillow reads and decodes a picture when its pixels are first asked for, and that is not safe in two threads at once.
"""

import copy
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageFile

from internvl_rt.errors import MediaError
from internvl_rt.inputs.decoding import check_size, open_encoded, pillow_errors
from internvl_rt.inputs.media import BORROWED, read_borrowed
from internvl_rt.inputs.tiles import ImageOptions

# What decides on the pixels besides the encoded bytes and the frame. `draft` has set the former: a JPEG is decoded at
# part of its size. The latter stand in `info`, where a caller may change them: transparency and orientation.
_DRAFT = ("tile", "_size", "_mode", "decoderconfig")
_INFO = ("transparency", "exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


@dataclass(frozen=True, slots=True)
class AsOpened:
    """How a caller had opened a picture that is not decoded yet. It is plain data, and equal pixels have equal `repr`s.

    Together with the encoded bytes it gives the caller's pixels.
    """

    plugin: type[ImageFile.ImageFile]
    frame: int
    draft: dict[str, Any]
    info: dict[str, Any]

    def open(self, content: bytes, name: str, options: ImageOptions) -> Image.Image:
        """Opens the picture anew, at the same frame. Raises MediaError if that is another picture, or too large."""
        own = open_encoded(content, name, options, formats=None, frame=self.frame)
        if type(own) is not self.plugin:
            raise MediaError(
                f"{name} cannot be read again from its file: call its load() first, or pass its path or bytes"
            )
        own.__dict__.update({key: copy.copy(value) for key, value in self.draft.items()})
        for key in _INFO:
            own.info.pop(key, None)
        own.info.update(self.info)
        return own


def own_picture(image: Image.Image, name: str, options: ImageOptions) -> tuple[bytes, AsOpened] | Image.Image:
    """Returns what gives the same pixels, and nobody else uses.

    Of a picture that has been decoded it is one that shares the pixels with the caller's, and must not be written into.
    Of one that has not it is the encoded bytes, and how it was opened; they are read while no other request uses the
    picture or its file. Later frames of a WEBP or AVIF, which have dropped their bytes by then, are decoded in place.

    Raises MediaError if the picture is too large, closed, or cannot be read.
    """
    check_size(*image.size, name, options)
    with pillow_errors(name), BORROWED.use(image, getattr(image, "fp", None)):
        decoded = _has_pixels(image, name)
        if not isinstance(image, ImageFile.ImageFile):
            return _sharing(image)
        if decoded and (image.fp is None or not image.tile):
            image.load()
            return _sharing(image)
        if image.fp is None:
            raise _closed(name)
        content = read_borrowed(image.fp, name, "image", options.max_image_bytes)
        draft = {key: copy.copy(getattr(image, key)) for key in _DRAFT}
        info = {key: copy.copy(image.info[key]) for key in _INFO if key in image.info}
        return content, AsOpened(type(image), image.tell(), draft, info)


def _has_pixels(image: Image.Image, name: str) -> bool:
    """Returns whether a picture holds pixels, be it those of an earlier frame. Raises MediaError if it was closed."""
    try:
        return image.im is not None
    except AssertionError:
        return False
    except ValueError as error:
        raise _closed(name) from error


def _closed(name: str) -> MediaError:
    return MediaError(f"{name} was closed: call its load() and keep it open, or pass its path or its bytes")


def _sharing(image: Image.Image) -> Image.Image:
    """Returns a picture that shares the pixels; a palette, which Pillow updates when it is used, has a copy."""
    return image._new(image.im.copy() if image.mode in ("P", "PA") else image.im)
