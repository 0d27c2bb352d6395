"""Images of a conversation, frames of clips among them: opened, measured by their headers, decoded and turned upright."""

import errno
import io
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from PIL import ExifTags, Image, ImageOps

from ..environment import pixel_limit
from ..errors import InputError
from .clips import Frame, frame_jpeg, frame_size
from .conversation import Conversation, check_picture
from .files import check_regular_file
from .shown import printable

# None whose decoder starts a program (EPS) or is seldom fed damaged files. What phones write as MPO opens as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# A lack of this machine, not a fault of the image.
_LACKS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

# Pillow warns at the limit; here it is an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Result = TypeVar("Result")


def open_image(source: Any) -> Image.Image:
    """Opens an image; its pixels are read later, when they are needed.

    Args:
        source: path, PIL image, {"bytes", "path"} of a `datasets.Image` column that does not decode, or frame of a clip.

    Raises:
        InputError: if it is missing, no regular file, of no format of `FORMATS`, or larger than `pixel_limit`.
    """
    limit, name = pixel_limit(), describe_source(source)
    try:
        check_picture(source)
    except ValueError as error:
        raise InputError(str(error)) from None
    if isinstance(source, Image.Image):
        image = source
    else:
        if isinstance(source, Frame):
            source = io.BytesIO(frame_jpeg(source))
        elif isinstance(source, dict):
            source = io.BytesIO(source["bytes"]) if source.get("bytes") else source["path"]
        if not isinstance(source, io.BytesIO):
            check_regular_file(source, "an image file")
        try:
            image = _guarded(lambda: Image.open(source, formats=FORMATS), name)
        except Image.DecompressionBombError as error:  # far above the limit
            raise InputError(f"{name}: expected at most {limit} pixels (--max_image_pixels), found: {error}") from None
    _check_pixels(image.size, name)
    return image


def image_size(source: Any) -> tuple[int, int]:
    """Width and height in pixels of an image turned upright, from its header alone.

    Args:
        source: see `open_image`.

    Raises:
        InputError: if `open_image` refuses it or its header is damaged.
    """
    if isinstance(source, Frame):
        size = frame_size(source)
        _check_pixels(size, describe_source(source))
        return size
    image = open_image(source)
    try:
        turned = _guarded(lambda: _orientation(image) >= 5, describe_source(source))
        return (image.height, image.width) if turned else image.size
    finally:
        if image is not source:
            image.close()


def load_image(source: Any) -> Image.Image:
    """An image, decoded to its end and turned upright.

    Args:
        source: see `open_image`.

    Raises:
        InputError: if `open_image` refuses it or it cannot be decoded to its end.
    """
    image = open_image(source)

    def decode() -> Image.Image:
        image.load()
        # What a camera wrote beside the pixels; every viewer shows the picture turned that way.
        return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image

    return _guarded(decode, describe_source(source))


def load_images(conversation: Conversation) -> list[Image.Image]:
    """Images of a conversation, decoded and turned upright.

    Raises:
        InputError: with the conversation's id, the turn, the image and its file, see `load_image`.
    """
    return _for_each_image(conversation, load_image)


def image_sizes(
    conversation: Conversation, size: Callable[[Any], tuple[int, int]] = image_size
) -> list[tuple[int, int]]:
    """Width and height in pixels of each image of a conversation, from the headers alone.

    Args:
        conversation (Conversation): that `check_conversation` has passed.
        size (Callable): `image_size`, or one that remembers.

    Raises:
        InputError: with the conversation's id, the turn, the image and its file, see `image_size`.
    """
    return _for_each_image(conversation, size)


def describe_source(source: Any) -> str:
    """An image as messages name it: its path, or what stands for one."""
    if isinstance(source, dict):
        source = source.get("path") or "image bytes"
    if isinstance(source, str | os.PathLike):
        return printable(os.fspath(source))
    return printable(str(source)) if isinstance(source, Frame) else "image"


def _check_pixels(size: tuple[int, int], name: str) -> None:
    if size[0] * size[1] > pixel_limit():
        found = f"{size[0]} x {size[1]}"
        raise InputError(f"{name}: expected at most {pixel_limit()} pixels (--max_image_pixels), found {found}")


def _for_each_image(conversation: Conversation, function: Callable[[Any], Result]) -> list[Result]:
    results = []
    for number, turn in enumerate(conversation.turns, 1):
        for index, source in enumerate(turn.images):
            try:
                results.append(function(source))
            except InputError as error:
                place = f"sample {printable(conversation.id)}, turn {number}: images[{index}]"
                raise InputError(f"{place}: {error}") from None
    return results


def _guarded(function: Callable[[], Result], name: str) -> Result:
    """Result of a call of Pillow; what a damaged file makes it raise becomes an InputError."""
    try:
        return function()
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # far above the limit, or a frame inside the file is
        limit = f"{pixel_limit()} pixels (--max_image_pixels)"
        raise InputError(f"{name}: expected at most {limit}, found: {printable(str(error))}") from None
    except Image.UnidentifiedImageError:
        raise InputError(
            f"{name}: expected a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM image, found another format or a damaged header"
        ) from None
    except Exception as error:  # decoders raise a dozen kinds, whatever the damage leads them to
        if isinstance(error, OSError) and error.errno in _LACKS:
            raise
        found = printable(str(error) or type(error).__name__)
        raise InputError(f"{name}: expected a whole image, found: {found}") from None


def _orientation(image: Image.Image) -> int:
    """EXIF orientation: 1 upright, 2 to 4 mirrored or upside down, 5 to 8 lying on a side; 1 if it makes no sense."""
    # Not image.getexif(): where a PNG's header holds no EXIF data, that decodes all of its pixels to look behind them.
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
