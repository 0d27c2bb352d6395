"""The HD transform against a direct, slow rewriting of the official one, and everything that is not in the golden set."""

import base64
import json
import math
import socket
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import ExifTags, Image

from phi3v import Phi3VImageProcessor
from phi3v.image_processing_phi3_v import count_image_tokens, hd_size, open_image, padded_size, to_rgb

MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa"]


def naive_hd_transform(image: Image.Image, num_crops: int, crop_size: int = 336) -> Image.Image:
    """The official HD transform step by step: turn to landscape, resize, pad, turn back."""
    portrait = image.width < image.height
    if portrait:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    scale = max(s for s in range(1, num_crops + 1) if s * math.ceil(s / ratio) <= num_crops or s == 1)
    width = scale * crop_size
    height = max(1, int(width / ratio))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    padded = Image.new("RGB", (width, math.ceil(height / crop_size) * crop_size), (255, 255, 255))
    padded.paste(image, (0, (padded.height - height) // 2))
    return padded.transpose(Image.Transpose.TRANSPOSE) if portrait else padded


def random_sizes(count: int, largest: int) -> list[tuple[int, int, int]]:
    """Widths, heights and numbers of crops; logarithmic, so that thin and tiny images come often."""
    random = np.random.default_rng(0)
    sides = np.exp(random.uniform(0, np.log(largest), (count, 2))).astype(int)
    return [(int(w), int(h), int(n)) for (w, h), n in zip(sides, random.integers(1, 17, count), strict=True)]


@pytest.mark.parametrize("crop_size", [28, 336])
def test_hd_image_is_that_of_the_naive_transform(crop_size):
    for width, height, num_crops in random_sizes(500 if crop_size == 28 else 50, 1500):
        image = tiny.picture(width, height)
        found = Phi3VImageProcessor(num_crops=num_crops, crop_size=crop_size).hd_transform(image)
        expected = np.asarray(naive_hd_transform(image, num_crops, crop_size))
        assert np.array_equal(found, expected), (width, height, num_crops)


@pytest.mark.parametrize("num_crops", range(1, 17))
def test_every_num_crops_is_respected_and_used_as_far_as_possible(num_crops):
    for width, height, _ in random_sizes(300, 5000):
        columns, rows = (side // 336 for side in padded_size(*hd_size(width, height, num_crops)))
        assert 1 <= columns * rows <= num_crops, (width, height)
    assert Phi3VImageProcessor(num_crops=num_crops).hd_transform(tiny.picture(64, 64)).shape[0] == 336 * math.isqrt(
        num_crops
    )


@pytest.mark.parametrize(
    ("size", "num_crops", "hd"),
    [
        ((1, 1), 4, (672, 672)),
        ((1, 1), 16, (1344, 1344)),
        ((3000, 1), 4, (1344, 336)),
        ((1, 3000), 4, (336, 1344)),
        ((3000, 1), 1, (336, 336)),
    ],
)
def test_tiny_and_extremely_thin_images_keep_at_least_one_row_of_pixels(size, num_crops, hd):
    processor = Phi3VImageProcessor(num_crops=num_crops)
    black = Image.new("RGB", size)
    assert processor.hd_transform(black).shape == (hd[1], hd[0], 3)
    assert processor.hd_transform(black).min() == 0, "something of the image must be left"
    assert processor(black)["image_sizes"].tolist() == [[hd[1], hd[0]]]


def test_padding_is_white_and_halved_with_the_odd_row_below():
    hd = Phi3VImageProcessor(num_crops=1, crop_size=28).hd_transform(Image.new("RGB", (28, 13)))
    white_rows = (hd == 255).all(axis=(1, 2))
    assert white_rows.tolist() == [True] * 7 + [False] * 13 + [True] * 8


def test_crops_are_the_global_view_and_then_the_hd_image_row_by_row():
    processor = Phi3VImageProcessor(num_crops=6)
    image = tiny.picture(90, 60)
    hd = torch.from_numpy(processor.hd_transform(image).copy()).permute(2, 0, 1) / 255
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    hd = (hd - mean[:, None, None]) / std[:, None, None]
    features = processor(image)
    assert features["image_sizes"].tolist() == [[672, 1008]]
    crops = features["pixel_values"]
    assert crops.dtype == torch.float32
    assert crops.shape == (7, 3, 336, 336)
    whole = torch.nn.functional.interpolate(hd[None], size=(336, 336), mode="bicubic")
    torch.testing.assert_close(crops[:1], whole, rtol=0, atol=1e-6)
    for row in range(2):
        for column in range(3):
            tile = hd[:, 336 * row : 336 * (row + 1), 336 * column : 336 * (column + 1)]
            torch.testing.assert_close(crops[1 + 3 * row + column], tile, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_every_pil_mode_becomes_what_pil_makes_of_it(mode):
    if mode == "RGBa":
        image = tiny.picture(20, 10).convert("RGBA").convert(mode)
    elif mode == "LAB":  # PIL does not convert to it
        image = Image.frombytes(mode, (20, 10), tiny.picture(20, 10).tobytes())
    elif mode == "PA":
        image = tiny.picture(20, 10).convert("P").convert(mode)
    else:
        image = tiny.picture(20, 10).convert(mode)
    assert image.mode == mode
    processor = Phi3VImageProcessor(num_crops=2)
    assert np.array_equal(to_rgb(image), image.convert("RGB"))
    assert np.array_equal(processor.hd_transform(image), processor.hd_transform(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bit_greyscale_keeps_its_high_bits(mode):
    values = (np.arange(200).reshape(10, 20) * 327).astype(">u2" if mode == "I;16B" else "<u2")
    image = Image.frombytes(mode, (20, 10), values.tobytes())
    assert np.array_equal(np.asarray(to_rgb(image))[..., 0], values // 256)


def test_alpha_is_dropped_and_not_composited():
    rgba = np.dstack([np.asarray(tiny.picture(20, 10)), np.zeros((10, 20), np.uint8)])
    assert np.array_equal(to_rgb(Image.fromarray(rgba)), rgba[..., :3])


RGB = np.asarray(tiny.picture(20, 10))  # (10, 20, 3)
GREY = RGB[..., 0]
RGBA = np.dstack([RGB, GREY])


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (RGB, RGB),
        (RGB.transpose(2, 0, 1), RGB),
        (RGB.astype(np.int64), RGB),
        (RGB / 255, RGB),
        ((RGB / 255).astype(np.float32), RGB),
        (np.clip(RGB - 0.4, 0, 255) / 255, RGB),
        (RGBA, RGB),
        (RGBA.transpose(2, 0, 1), RGB),
        (GREY, GREY[..., None].repeat(3, -1)),
        (GREY[None], GREY[..., None].repeat(3, -1)),
        (GREY[..., None], GREY[..., None].repeat(3, -1)),
    ],
    ids=["HWC", "CHW", "int64", "float64", "float32", "between levels", "HWC-alpha", "CHW-alpha", "HW", "1HW", "HW1"],
)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["numpy", "torch"])
def test_arrays_and_tensors_give_what_the_same_pil_image_gives(array, expected, as_tensor):
    image = torch.from_numpy(array.copy()) if as_tensor else array
    processor = Phi3VImageProcessor(num_crops=4)
    expected = processor(Image.fromarray(np.ascontiguousarray(expected)))
    found = processor(image)
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert torch.equal(found["image_sizes"], expected["image_sizes"])


@pytest.mark.parametrize(("dtype", "levels"), [(torch.float16, 0), (torch.bfloat16, 1)])
def test_half_precision_tensors_are_rounded_to_the_nearest_level(dtype, levels):
    found = Phi3VImageProcessor(num_crops=1).hd_transform((torch.from_numpy(RGB.copy()) / 255).to(dtype))
    expected = Phi3VImageProcessor(num_crops=1).hd_transform(RGB)
    assert np.abs(found.astype(int) - expected).max() <= levels


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (7, TypeError, "expected a PIL image, NumPy array, torch tensor or path, found int"),
        (None, TypeError, "found NoneType"),
        (np.zeros((10, 20, 2), np.uint8), ValueError, r"shape \(10, 20, 2\): expected \(H, W\), \(H, W, C\)"),
        (np.zeros((2, 10, 20, 3), np.uint8), ValueError, r"shape \(2, 10, 20, 3\): expected"),
        (np.zeros((0, 20, 3), np.uint8), ValueError, "at least 1 pixel on each side"),
        (Image.new("RGB", (0, 5)), ValueError, "0 x 5 pixels: expected at least 1 pixel"),
        (np.full((4, 4, 3), 256), ValueError, r"values 256..256 of dtype int64: expected 0..255"),
        (np.full((4, 4, 3), -1), ValueError, r"values -1..-1 of dtype int64: expected 0..255"),
        (np.full((4, 4, 3), 1.5), ValueError, r"values 1.5..1.5 of dtype float64: expected 0..1"),
        (torch.full((3, 4, 4), float("nan")), ValueError, "values nan..nan of dtype float32: expected 0..1"),
    ],
    ids=["int", "None", "2 channels", "4-D", "no rows", "0 pixels", "256", "-1", "1.5", "nan"],
)
def test_wrong_images_are_refused_with_what_was_found_and_expected(image, error, message):
    with pytest.raises(error, match=message):
        Phi3VImageProcessor()(image)


@pytest.mark.parametrize("num_crops", [0, -1, 17, 4.0, "4"])
def test_wrong_num_crops_is_refused_when_built_and_when_called(num_crops):
    with pytest.raises(ValueError, match=f"num_crops is {num_crops!r}: expected a whole number from 1 to 16"):
        Phi3VImageProcessor(num_crops=num_crops)
    with pytest.raises(ValueError, match=f"num_crops is {num_crops!r}: expected a whole number from 1 to 16"):
        Phi3VImageProcessor()(tiny.picture(8, 8), num_crops=num_crops)


@pytest.mark.parametrize(
    ("rows", "columns", "tokens"), [(1, 1, 313), (1, 2, 457), (2, 2, 757), (3, 4, 1921), (4, 4, 2509)]
)
def test_token_count_of_a_grid_of_crops(rows, columns, tokens):
    assert count_image_tokens(336 * rows, 336 * columns) == tokens
    assert tokens == (rows * columns + 1) * 144 + 1 + (rows + 1) * 12


def test_token_count_is_known_without_decoding_the_image():
    for width, height, num_crops in random_sizes(40, 800):
        processor = Phi3VImageProcessor(num_crops=num_crops, crop_size=28, num_img_tokens=4)
        features = processor(tiny.picture(width, height))
        assert features["num_img_tokens"] == [processor.calc_num_image_tokens_from_image_size(width, height)]


def test_nested_lists_of_images_are_taken_in_order():
    images = [tiny.picture(30, 20, seed) for seed in range(3)]
    processor = Phi3VImageProcessor(num_crops=2, crop_size=28)
    nested = processor([[images[0]], [images[1], images[2]]])
    assert torch.equal(nested["pixel_values"], torch.cat([processor(image)["pixel_values"] for image in images]))


def test_numpy_tensors_on_request():
    features = Phi3VImageProcessor(num_crops=1)(tiny.picture(8, 8), return_tensors="np")
    assert isinstance(features["pixel_values"], np.ndarray)
    assert isinstance(features["image_sizes"], np.ndarray)


def test_the_callers_image_is_left_as_it_was():
    image, array = tiny.picture(20, 10), RGB.copy()
    Phi3VImageProcessor()([image, array])
    assert image.tobytes() == tiny.picture(20, 10).tobytes()
    assert np.array_equal(array, RGB)


def test_saved_processor_is_the_same_when_loaded(tmp_path):
    processor = Phi3VImageProcessor(num_crops=7, crop_size=28, num_img_tokens=4, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    loaded = Phi3VImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert torch.equal(loaded(tiny.picture(50, 30))["pixel_values"], processor(tiny.picture(50, 30))["pixel_values"])


# Source: https://huggingface.co/microsoft/Phi-3.5-vision-instruct (preprocessor_config.json)
OFFICIAL_FILE = {
    "auto_map": {
        "AutoImageProcessor": "processing_phi3_v.Phi3VImageProcessor",
        "AutoProcessor": "processing_phi3_v.Phi3VProcessor",
    },
    "do_convert_rgb": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Phi3VImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "num_crops": 4,
    "num_img_tokens": 144,
    "processor_class": "Phi3VProcessor",
}


def test_official_preprocessor_config_is_accepted_and_written_back(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OFFICIAL_FILE))
    processor = Phi3VImageProcessor.from_pretrained(tmp_path)
    assert (processor.num_crops, processor.num_img_tokens, processor.crop_size) == (4, 144, 336)
    processor.save_pretrained(tmp_path / "saved")
    written = json.loads(Path(tmp_path / "saved" / "preprocessor_config.json").read_text())
    expected = {key: value for key, value in OFFICIAL_FILE.items() if key != "auto_map"}
    assert {key: written.get(key) for key in expected} == expected
    # Only the class that is on the hub, and nothing from which a video processor would be inferred.
    assert written["auto_map"] == {
        "AutoProcessor": "microsoft/Phi-3.5-vision-instruct--" + OFFICIAL_FILE["auto_map"]["AutoProcessor"]
    }


# Files


def written(folder: Path, name: str = "a picture #1.png", image: Image.Image | None = None, **options) -> Path:
    (image or Image.fromarray(RGB)).save(folder / name, **options)
    return folder / name


def base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


@pytest.mark.parametrize(
    "refer",
    [
        lambda path: path,
        str,
        lambda path: path.as_uri(),
        lambda path: path.as_uri().replace("file:///", "file://localhost/"),
        base64_of,
        lambda path: "data:image/png;base64," + base64_of(path),
        lambda path: "data:image/png;base64," + base64.encodebytes(path.read_bytes()).decode(),
    ],
    ids=["Path", "path", "file", "file on localhost", "base64", "data", "data in lines"],
)
def test_a_file_gives_the_crops_of_its_pixels(refer, tmp_path):
    processor = Phi3VImageProcessor(num_crops=2)
    found = processor([refer(written(tmp_path))])
    assert torch.equal(found["pixel_values"], processor(Image.fromarray(RGB))["pixel_values"])


def test_a_relative_path_is_looked_for_in_the_working_directory(tmp_path, monkeypatch):
    written(tmp_path, "cat.png")
    monkeypatch.chdir(tmp_path)
    assert open_image("cat.png").size == RGB.shape[1::-1]


def test_a_photo_taken_upright_is_turned_upright(tmp_path):
    lying = Image.new("RGB", (40, 20))
    exif = lying.getexif()
    exif[ExifTags.Base.Orientation] = 6
    assert open_image(written(tmp_path, "photo.jpg", lying, exif=exif)).size == (20, 40)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("missing.png", None, "no such file"),
        ("folder.png", "folder", "Is a directory"),
        ("text.png", b"hello", "cannot identify image file"),
        ("cut.png", "cut", "truncated"),
        ("program.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "cannot identify image file"),
    ],
)
def test_files_that_are_no_image_are_refused_in_one_line_that_names_them(name, content, found, tmp_path):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content == "cut":
        whole = written(tmp_path).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif content:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="expected a path, file:// reference or base64 of a JPEG, PNG") as error:
        Phi3VImageProcessor()(str(path))
    assert str(path)[:80] in str(error.value)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("https://example.com/a.png", "an address on a network, from which nothing is fetched; download it first"),
        ("HTTP://127.0.0.1/a.png", "an address on a network"),
        ("file://server/share/a.png", "a file of another machine, server"),
        ("data:image/png;base64,@@@@", "found: "),
        ("data:image/png;base64," + "QUJD" * 100, "cannot identify image file"),
        ("QUJD" * 10, "no such file"),
        ("", "Is a directory"),
        ("a\x00b", "no such file"),
    ],
)
def test_references_that_lead_to_no_image_are_refused_and_nothing_is_fetched(source, found, monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("opened a socket"))
    with pytest.raises(ValueError, match="expected a path, file:// reference or base64 of") as error:
        open_image(source)
    assert found in str(error.value)


def test_padded_crops_are_the_official_layout():
    processor = Phi3VImageProcessor(num_crops=4)
    features = processor([Image.new("RGB", (800, 300)), Image.new("RGB", (100, 100))])
    padded = processor.pad_crops(features["pixel_values"], features["image_sizes"], num_crops=5)
    counts = [1 + height * width // 336**2 for height, width in features["image_sizes"].tolist()]
    assert padded.shape == (2, 6, 3, 336, 336)
    for image, crops, count in zip(padded, features["pixel_values"].split(counts), counts, strict=True):
        assert torch.equal(image[:count], crops)
        assert not image[count:].any()


def test_each_image_may_have_crops_of_its_own():
    images = [tiny.picture(90, 50, seed) for seed in range(3)]
    processor = tiny.processor(16).image_processor
    together = processor(images, num_crops=[16, 4, 1])
    apart = [processor(image, num_crops=most) for image, most in zip(images, (16, 4, 1), strict=True)]
    assert together["image_sizes"].equal(torch.cat([found["image_sizes"] for found in apart]))
    assert together["pixel_values"].equal(torch.cat([found["pixel_values"] for found in apart]))
    with pytest.raises(ValueError, match=r"num_crops for 2 image\(s\): expected one number, or one for each of 3"):
        processor(images, num_crops=[16, 4])
