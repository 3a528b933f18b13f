"""Takes Pillow pictures that belong to a caller: any thread may, at the same time, and the caller's stays as it is.

Pillow reads and decodes a picture when its pixels are first asked for, and that is not safe in two threads at once.
"""

import copy

from PIL import Image, ImageFile

from internvl_rt.errors import MediaError
from internvl_rt.inputs.decoding import check_size, open_encoded, pillow_errors
from internvl_rt.inputs.media import BORROWED, read_borrowed
from internvl_rt.inputs.tiles import ImageOptions

_DRAFT = ("tile", "_size", "_mode", "decoderconfig")  # what `draft` has set: a JPEG to be decoded at part of its size


def own_picture(image: Image.Image, name: str, options: ImageOptions) -> Image.Image:
    """Returns a picture of the same pixels that nobody else uses.

    One that has been decoded shares its pixels with the caller's, and must not be written into. One that has not is
    opened anew from its encoded bytes, at the same frame; they are read while no other request uses the picture or its
    file. Later frames of a WEBP or AVIF, which have dropped their bytes by then, are decoded in place.

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
        frame, info = image.tell(), dict(image.info)
        draft = {key: copy.copy(getattr(image, key)) for key in _DRAFT}
    own = open_encoded(content, name, options, formats=None, frame=frame)
    if type(own) is not type(image):
        raise MediaError(f"{name} cannot be read again from its file: call its load() first, or pass its path or bytes")
    own.__dict__.update(draft, info=info)
    return own


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
