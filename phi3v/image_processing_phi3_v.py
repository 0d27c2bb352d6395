"""Phi3VImageProcessor: the HD transform, which turns an image of any size into 336 x 336 crops, without torchvision."""

import base64
import binascii
import io
import math
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import TensorType

from .configuration_phi3_v import OFFICIAL_CODE

WHITE = (255, 255, 255)
# A page at num_crops 16 gives 17 crops. The official processor takes any number; both models were trained up to 16.
MAX_NUM_CROPS = 16

# Pillow would hand other formats to external programs (EPS), or reads them by code that hardly anyone tests.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def hd_size(width: int, height: int, num_crops: int, crop_size: int = 336) -> tuple[int, int]:
    """Size an image is resized to before it is padded to whole crops.

    The longer side becomes the largest whole number of crops for which the image still fits into `num_crops` crops.

    Args:
        width, height (int): size of the image, in pixels.
        num_crops (int): most crops the image may take, without the global view.
        crop_size (int): side of a crop, in pixels.

    Returns:
        tuple[int, int]: width and height in pixels, the shorter one at least 1: an image so thin that it would round to
        0 (3000 x 1 pixels at num_crops 4) keeps one row, where the official code fails.
    """
    ratio = max(width, height) / min(width, height)
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= num_crops:
        scale += 1
    long_side = scale * crop_size
    short_side = max(1, int(long_side / ratio))
    return (long_side, short_side) if width >= height else (short_side, long_side)


def padded_size(width: int, height: int, crop_size: int = 336) -> tuple[int, int]:
    """Smallest whole number of crops that holds `width` x `height` pixels, in pixels."""
    return math.ceil(width / crop_size) * crop_size, math.ceil(height / crop_size) * crop_size


def count_image_tokens(height: int, width: int, crop_size: int = 336, tokens_per_side: int = 12) -> int:
    """Image tokens of an image of `height` x `width` pixels after the HD transform (its `image_sizes` entry).

    Every crop gives `tokens_per_side`**2 tokens, the global view too; each row of the assembled map ends with one
    separator, and one more stands between the map and the global view.
    """
    rows, columns = height // crop_size, width // crop_size
    return (rows * columns + 1) * tokens_per_side**2 + 1 + (rows + 1) * tokens_per_side


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB copy of a PIL image of any mode.

    As in the official processor: `Image.convert("RGB")`, which drops alpha rather than compositing it. 16-bit greyscale,
    which PIL would clip to white, keeps its 8 high bits. The first frame of an animation is used. EXIF orientation is
    not applied here, as in the official processor: apply `PIL.ImageOps.exif_transpose` when the file is opened.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(source: str | Path) -> Image.Image:
    """Reads an image and turns it upright by its EXIF orientation, as viewers show it.

    Args:
        source (str | Path): a path, a `file://` reference, or the bytes in base64, bare or as a `data:` URI.

    Raises:
        ValueError: if there is no such file, if it holds no whole image of one of `IMAGE_FORMATS`, or if it lies elsewhere
            on a network: nothing is fetched.
    """
    name = repr(str(source)[:80])
    try:
        with Image.open(_locate(source), formats=IMAGE_FORMATS) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow names bytes by their address in memory.
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error).partition(" <_io")[0][:200]
        raise ValueError(
            f"image {name}: expected a path, file:// reference or base64 of a {', '.join(IMAGE_FORMATS)} image, found: {reason}"
        ) from None


def _locate(source: str | Path) -> Path | io.BytesIO:
    if isinstance(source, Path):
        return source
    scheme = source.partition(":")[0].lower()
    if scheme in ("http", "https"):
        raise ValueError("an address on a network, from which nothing is fetched; download it first")
    if scheme == "file":
        reference = urlsplit(source)
        if reference.netloc not in ("", "localhost"):
            raise ValueError(f"a file of another machine, {reference.netloc}")
        return Path(unquote(reference.path))
    if scheme == "data":
        source = source.partition(",")[2]
    else:
        # Longer than any path: the operating system would refuse to look.
        if len(source) < 4096 and Path(source).exists():
            return Path(source)
        # A word that happens to be base64 is no image of some 20 bytes at least; what was meant is a file.
        if len(source) < 64:
            raise FileNotFoundError
    try:
        # Broken into lines by some encoders.
        return io.BytesIO(base64.b64decode("".join(source.split()), validate=True))
    except binascii.Error:
        if scheme == "data":
            raise
        raise FileNotFoundError from None


def to_pil(image) -> Image.Image:
    """An RGB PIL image of a PIL image, NumPy array, torch tensor or file.

    Args:
        image: a PIL image; an array / tensor of shape (H, W), (H, W, C) or (C, H, W) with C = 1, 3 or 4, integers from
            0 to 255 or floating point numbers from 0 to 1; or what `open_image` reads.

    Raises:
        TypeError: if it is something else.
        ValueError: if the shape or the range of the values does not fit, if a side has 0 pixels, or if a file cannot be read.
    """
    if isinstance(image, (str, Path)):
        image = open_image(image)
    if not isinstance(image, Image.Image):
        image = _array_to_pil(image)
    if not all(image.size):
        raise ValueError(f"image of {image.width} x {image.height} pixels: expected at least 1 pixel on each side")
    return to_rgb(image)


def _array_to_pil(image) -> Image.Image:
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"expected a PIL image, NumPy array, torch tensor or path, found {type(image).__name__}")
    if image.ndim == 3 and image.shape[0] in (1, 3, 4) and image.shape[-1] not in (1, 3, 4):
        image = image.transpose(1, 2, 0)
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (1, 3, 4))):
        raise ValueError(f"image array of shape {image.shape}: expected (H, W), (H, W, C) or (C, H, W), C = 1, 3 or 4")
    if 0 in image.shape:
        raise ValueError(f"image array of shape {image.shape}: expected at least 1 pixel on each side")
    if image.dtype == np.bool_:
        image = image.astype(np.uint8) * 255
    low, high = image.min(), image.max()
    limit = 1 if np.issubdtype(image.dtype, np.floating) else 255
    if not (low >= 0 and high <= limit):
        raise ValueError(f"image values {low:g}..{high:g} of dtype {image.dtype}: expected 0..{limit}")
    if limit == 1:
        image = (image * 255).round()
    image = image.astype(np.uint8)
    return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)


class Phi3VImageProcessor(BaseImageProcessor):
    """Turns images into the normalised crops that Phi-3-vision reads: a global view, then the HD crops row by row.

    The HD image is equal to the official one byte for byte, the crops and the global view bit for bit.

    Args:
        num_crops (int): most HD crops of an image, 1 to 16; the official advice is 16 for one image and 4 for several.
        image_mean, image_std (list[float]): per channel, for values in 0..1.
        num_img_tokens (int): image tokens of one crop, 144 = 12 x 12.
        crop_size (int): side of a crop in pixels, `vision_config.image_size` of the model.
        do_convert_rgb (bool): kept for the official file; images are always converted.

    Source: https://huggingface.co/microsoft/Phi-3.5-vision-instruct (preprocessor_config.json)
    """

    model_input_names = ["pixel_values", "image_sizes"]

    def __init__(
        self,
        num_crops: int = 4,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        num_img_tokens: int = 144,
        crop_size: int = 336,
        do_convert_rgb: bool = True,
        **kwargs,
    ):
        # The official file names remote code there.
        kwargs.pop("auto_map", None)
        super().__init__(**kwargs)
        self.num_crops = self._resolve_num_crops(num_crops)
        self.image_mean = list(image_mean or OPENAI_CLIP_MEAN)
        self.image_std = list(image_std or OPENAI_CLIP_STD)
        self.num_img_tokens = num_img_tokens
        self.crop_size = crop_size
        self.do_convert_rgb = do_convert_rgb

    def _resolve_num_crops(self, num_crops: int | None) -> int:
        num_crops = self.num_crops if num_crops is None else num_crops
        if isinstance(num_crops, bool) or not isinstance(num_crops, Integral) or not 1 <= num_crops <= MAX_NUM_CROPS:
            raise ValueError(f"num_crops is {num_crops!r}: expected a whole number from 1 to {MAX_NUM_CROPS}")
        return int(num_crops)

    def calc_num_image_tokens_from_image_size(self, width: int, height: int, num_crops: int | None = None) -> int:
        """Image tokens of a `width` x `height` image, known without decoding it (same name as the official method)."""
        resized = hd_size(width, height, self._resolve_num_crops(num_crops), self.crop_size)
        padded_width, padded_height = padded_size(*resized, self.crop_size)
        return count_image_tokens(padded_height, padded_width, self.crop_size, math.isqrt(self.num_img_tokens))

    def to_dict(self) -> dict:
        """Serialises with the fields of the official preprocessor_config.json; `auto_map` names the official code on the hub.

        Not AutoImageProcessor: transformers 5 would infer the name of a video processor from it, and `pipeline()` ask on the
        terminal whether to run its code. The official processor finds its image processor without it.
        """
        code = {"AutoProcessor": f"{OFFICIAL_CODE}processing_phi3_v.Phi3VProcessor"}
        return super().to_dict() | {"auto_map": code, "processor_class": "Phi3VProcessor"}

    def hd_transform(self, image, num_crops: int | None = None) -> np.ndarray:
        """The HD image: resized (bilinear, antialiased) and padded with white above and below, or left and right.

        Args:
            image: PIL image, NumPy array, torch tensor or file, see `to_pil`.
            num_crops (int, optional): most crops, instead of the processor's own.

        Returns:
            np.ndarray: uint8, (H, W, 3), H and W multiples of the crop size.
        """
        image = to_pil(image)
        width, height = hd_size(image.width, image.height, self._resolve_num_crops(num_crops), self.crop_size)
        if image.width >= image.height:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        else:
            # The official code transposes a portrait image, so that its vertical pass comes first; PIL's own order
            # differs by up to 2 levels. Two one-way passes give the same bytes without the two transposes.
            image = image.resize((image.width, height), Image.Resampling.BILINEAR)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        full_width, full_height = padded_size(width, height, self.crop_size)
        if (full_width, full_height) != (width, height):
            canvas = Image.new("RGB", (full_width, full_height), WHITE)
            canvas.paste(image, ((full_width - width) // 2, (full_height - height) // 2))
            image = canvas
        return np.asarray(image)

    def preprocess(
        self,
        images,
        num_crops: int | Sequence[int] | None = None,
        return_tensors: str | TensorType | None = TensorType.PYTORCH,
        **kwargs,
    ) -> BatchFeature:
        """Preprocesses one image or any nesting of lists of images.

        Args:
            images: PIL images, NumPy arrays, torch tensors or files, see `to_pil`.
            num_crops (int or list[int], optional): most HD crops of an image, or of each image, instead of the processor's own.
            return_tensors (str, optional): "pt" (the default) or "np".

        Returns:
            BatchFeature: pixel_values, float32, (total crops, 3, crop size, crop size), for each image its global view
            and then its HD crops row by row; image_sizes, int64, (images, 2), height and width of each HD image in
            pixels; num_img_tokens, list[int], image tokens of each image.

        Raises:
            ValueError: if `num_crops` is out of range or not one for each image, or an image cannot be used.
        """
        images = _flatten(images)
        if not images:
            raise ValueError("found no image: expected at least one")
        of_each = num_crops if isinstance(num_crops, Sequence) else [num_crops] * len(images)
        if len(of_each) != len(images):
            raise ValueError(
                f"num_crops for {len(of_each)} image(s): expected one number, or one for each of {len(images)}"
            )
        images = [self.hd_transform(image, crops) for image, crops in zip(images, of_each, strict=True)]
        sizes = [image.shape[:2] for image in images]
        counts = [1 + height * width // self.crop_size**2 for height, width in sizes]
        pixel_values = torch.empty(sum(counts), 3, self.crop_size, self.crop_size)
        for image, crops in zip(images, pixel_values.split(counts), strict=True):
            self._crop(image, crops)
        side = math.isqrt(self.num_img_tokens)
        data = {
            "pixel_values": pixel_values,
            "image_sizes": torch.tensor(sizes, dtype=torch.long),
            "num_img_tokens": [count_image_tokens(height, width, self.crop_size, side) for height, width in sizes],
        }
        if return_tensors is not None and TensorType(return_tensors) == TensorType.NUMPY:
            data = {key: np.asarray(value) for key, value in data.items()}
        return BatchFeature(data)

    def pad_crops(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor, num_crops: int | None = None
    ) -> torch.Tensor:
        """The official layout: (total crops, 3, S, S) -> (images, num_crops + 1, 3, S, S), filled up with zeros."""
        counts = [1 + height * width // self.crop_size**2 for height, width in image_sizes.tolist()]
        most = 1 + self._resolve_num_crops(num_crops)
        padded = pixel_values.new_zeros(len(counts), most, *pixel_values.shape[1:])
        for image, crops in zip(padded, pixel_values.split(counts), strict=True):
            image[: len(crops)] = crops
        return padded

    def _crop(self, image: np.ndarray, crops: torch.Tensor) -> None:
        """Fills `crops` (1 + rows * columns, 3, S, S) with the global view and the crops of an HD image (H, W, 3)."""
        height, width, _ = image.shape
        rows, columns, side = height // self.crop_size, width // self.crop_size, self.crop_size
        tiles = crops[1:].view(rows, columns, 3, side, side)
        # Channel by channel: the memory for all three at once took a third of a page's time in page faults.
        pixels = torch.empty(height, width)
        for channel, (mean, std) in enumerate(zip(self.image_mean, self.image_std, strict=True)):
            pixels.numpy()[...] = image[..., channel]
            # The same three operations as the official transforms, in the same order.
            pixels.div_(255).sub_(mean).div_(std)
            crops[0, channel] = torch.nn.functional.interpolate(pixels[None, None], size=(side, side), mode="bicubic")[
                0, 0
            ]
            tiles[:, :, channel].copy_(pixels.view(rows, side, columns, side).transpose(1, 2))


def join_crops(tensors: list[torch.Tensor]) -> torch.Tensor:
    """torch.cat along the first dimension that does not copy a tensor that is alone: a page's crops are 23 MB."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def select_images(features: BatchFeature, order: list[int], crop_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """pixel_values and image_sizes of these of the images of `Phi3VImageProcessor`, in this order; copied only where it differs."""
    pixel_values, image_sizes = features["pixel_values"], features["image_sizes"]
    if order == list(range(len(image_sizes))):
        return pixel_values, image_sizes
    crops = pixel_values.split([1 + height * width // crop_size**2 for height, width in image_sizes.tolist()])
    return torch.cat([crops[index] for index in order]), image_sizes[order]


def _flatten(images) -> list:
    if isinstance(images, (list, tuple)):
        return [image for group in images for image in _flatten(group)]
    return [images]


__all__ = ["Phi3VImageProcessor"]
