"""Pictures small enough that a page with thousands of them can be sent: data URIs within a budget of bytes."""

import base64
import io
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from PIL import ImageOps

from ..data.images import open_image

LARGEST, SMALLEST = 896, 96  # pixels
MOST_BYTES = 30_000  # of one picture, however few there are
BYTES_PER_PIXEL = 0.09  # of a page of text as WebP, so that the first try is near
QUALITY = 70
THREADS = 4


def thumbnails(sources: Iterable[Any], count: int, budget: int, seconds: float | None = None) -> Iterator[str | None]:
    """A data URI for each picture; "" for one that cannot be read, None where nothing is left of budget or time.

    Args:
        sources (Iterable): pictures as `open_image` takes them.
        count (int): how many pictures there are at most.
        budget (int): bytes of all data URIs together.
        seconds (float, optional): after this time no further picture is made.
    """
    each = min(MOST_BYTES, int(budget * 3 / 4 / max(1, count)))
    end, left = seconds and time.monotonic() + seconds, budget
    with ThreadPoolExecutor(THREADS) as pool:
        # Pillow works beside Python; in batches, so that not all rows are held at once.
        rest = iter(sources)
        while batch := list(islice(rest, 8 * THREADS)):
            late = end is not None and time.monotonic() > end
            for uri in [None] * len(batch) if late else pool.map(lambda source: thumbnail(source, each), batch):
                if uri is not None and len(uri) > left:
                    uri = None
                left -= len(uri or "")
                yield uri


def thumbnail(source: Any, most_bytes: int) -> str:
    """A picture as a data URI of a WebP of about `most_bytes` or less, upright; "" if it cannot be read."""
    side = min(LARGEST, max(SMALLEST, int((most_bytes / BYTES_PER_PIXEL) ** 0.5)))
    try:
        # A copy only where the row holds the picture itself.
        opened = open_image(source)
        image = opened.copy() if opened is source else opened
        image.thumbnail((2 * side, 2 * side), reducing_gap=2)
        image = ImageOps.exif_transpose(image)
        image = _on_white(image)
        while True:
            image.thumbnail((side, side))
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=QUALITY, method=2)
            if buffer.tell() <= most_bytes or side <= SMALLEST:
                return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
            side = max(SMALLEST, int(0.95 * side * (most_bytes / buffer.tell()) ** 0.5))
    except Exception:  # decoders raise a dozen kinds; a page without one picture is better than none
        return ""


def _on_white(image):
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = image.copy()
        white.paste("white", (0, 0, *image.size))
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")
