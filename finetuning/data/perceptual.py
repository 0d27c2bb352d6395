"""What tells pictures that look alike from others: a digest of the pixels, and a perceptual hash."""

import imagehash
import numpy as np
import xxhash
from PIL import Image

SIDE = 16  # of the hash: 16 x 16 bits
STRIP = 256  # rows of pixels
WORDS = SIDE * SIDE // 64
# Bits. Saved again as JPEG of quality 40, at half or 1.3 times the size, or darkened by 15%, a picture stays within 12; of the
# 8 million pairs of the demo's pages, which differ in three small digits, 4 are within 12 and 154 within 20.
NEAR = 12


def identify_look(image: Image.Image) -> tuple[str, str]:
    """Digest of the pixels, and the perceptual hash (pHash), both as hexadecimal digits.

    Args:
        image (Image.Image): decoded, turned upright.
    """
    # As the model sees it: alpha is dropped.
    pixels = image if image.mode == "RGB" else image.convert("RGB")
    digest = xxhash.xxh3_128(f"{pixels.size} ".encode())
    # In strips: a copy of all pixels may be half a gigabyte.
    for top in range(0, pixels.height, STRIP):
        digest.update(pixels.crop((0, top, pixels.width, min(top + STRIP, pixels.height))).tobytes())
    return digest.hexdigest(), np.packbits(imagehash.phash(pixels, SIDE).hash).tobytes().hex()


def hash_bits(hashes: list[str]) -> np.ndarray:
    """Perceptual hashes of `identify_look` as uint64, (n, WORDS)."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), np.uint64).reshape(len(hashes), WORDS)
