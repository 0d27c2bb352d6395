"""Images of a conversation: opened, measured by their headers, decoded and turned upright."""

import io
import warnings

from PIL import ExifTags, Image, ImageOps

from ..errors import InputError
from .conversation import Conversation


def open_image(source) -> Image.Image:
    """Opens an image; its pixels are read later, when they are needed.

    Args:
        source: path, PIL image, or {"bytes", "path"} of a `datasets.Image` column that does not decode.

    Raises:
        InputError: if it is missing or not an image.
    """
    if isinstance(source, Image.Image):
        return source
    if source is None or (isinstance(source, dict) and source.get("bytes") is None and source.get("path") is None):
        raise InputError(f"expected an image, found {source}")
    if isinstance(source, dict):
        name = source.get("path") or "image bytes"
        source = io.BytesIO(source["bytes"]) if source.get("bytes") is not None else source["path"]
    else:
        name = source
    try:
        with warnings.catch_warnings():
            # Pillow's warning at this size is an error here, at twice the size it is one anyway.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source)
    except FileNotFoundError:
        raise InputError(f"{name}: expected an image file, found no such file") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{name}: expected an image, found: {error}") from None
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name}: expected at most {Image.MAX_IMAGE_PIXELS} pixels (--max_image_pixels), found: {error}"
        ) from None
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise InputError(
            f"{name}: expected at most {Image.MAX_IMAGE_PIXELS} pixels (--max_image_pixels), found {image.width} x {image.height}"
        )
    return image


def image_size(source) -> tuple[int, int]:
    """Width and height in pixels of an image turned upright, from its header alone.

    Args:
        source: see `open_image`.

    Raises:
        InputError: if it is missing or not an image.
    """
    image = open_image(source)
    try:
        return image.size[::-1] if _orientation(image) >= 5 else image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{describe_source(source)}: expected a whole image, found: {error}") from None
    finally:
        if image is not source:
            image.close()


def load_images(conversation: Conversation) -> list[Image.Image]:
    """Images of a conversation, decoded and turned upright.

    Raises:
        InputError: with the conversation's id and the file, if one is missing or cannot be decoded to its end.
    """
    images = []
    for source in conversation.images:
        try:
            image = open_image(source)
            image.load()
            # What a camera wrote beside the pixels; every viewer shows the picture turned that way.
            images.append(ImageOps.exif_transpose(image) if _orientation(image) != 1 else image)
        except InputError as error:
            raise InputError(f"sample {conversation.id}: {error}") from None
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(
                f"sample {conversation.id}: {describe_source(source)}: expected a whole image, found: {error}"
            ) from None
    return images


def _orientation(image: Image.Image) -> int:
    """EXIF orientation: 1 upright, 2 to 4 mirrored or upside down, 5 to 8 lying on a side; 1 if it makes no sense."""
    # Not image.getexif(): where a PNG's header holds no EXIF data, that decodes all of its pixels to look behind them.
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    return orientation if orientation in range(1, 9) else 1


def describe_source(image) -> str:
    return str((image.get("path") if isinstance(image, dict) else image) or "image")
