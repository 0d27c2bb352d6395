"""Phi3VImageProcessor against the official processor: bytes, not tolerances."""

import hashlib

import numpy as np
import pytest
from golden import arrays, case, check, image, manifest, names

from phi3v import Phi3VImageProcessor
from phi3v.image_processing_phi3_v import hd_size, padded_size


def digest(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize("key", names("image_processor", "key"))
def test_hd_image_and_crops_are_the_official_ones(key, record_property):
    recorded, values = case("image_processor", key, "key"), arrays("image_processor")
    processor = Phi3VImageProcessor(num_crops=recorded["num_crops"])
    picture = image(recorded["w"], recorded["h"], recorded["mode"], recorded["pattern"])
    assert hashlib.sha256(picture.tobytes()).hexdigest() == recorded["input_sha256"], "the test's own image is wrong"

    assert digest(processor.hd_transform(picture)) == recorded["hd_uint8_sha256"]
    features = processor(picture)
    assert features["image_sizes"].tolist() == [recorded["image_sizes"]]
    assert features["num_img_tokens"] == [recorded["num_img_tokens"]]
    assert processor.calc_num_image_tokens_from_image_size(*picture.size) == recorded["calc_num_image_tokens"]

    crops = features["pixel_values"].numpy()
    flat = crops.reshape(len(crops), -1)
    where = [[(s * 104729 + k * 7919) % flat.shape[1] for s in range(16)] for k in range(len(flat))]
    samples = np.take_along_axis(flat, np.array(where), axis=1)
    check(record_property, "pixel samples", samples, values[f"{key}/samples"], 0)
    stats = np.stack([flat.mean(1, dtype=np.float64), flat.std(1, dtype=np.float64), flat.min(1), flat.max(1)], 1)
    check(record_property, "crop mean, std, min, max", stats, values[f"{key}/stats"], 1e-6)
    assert digest(crops[1:]) == recorded["local_f32_sha256"], "HD crops"
    assert digest(crops[:1]) == recorded["global_f32_sha256"], "global view"


def test_several_images_follow_one_another_without_padding_crops(record_property):
    recorded = manifest("image_processor")["multi"]
    features = Phi3VImageProcessor(num_crops=4)([image(*entry) for entry in recorded["images"]])
    assert features["image_sizes"].tolist() == recorded["image_sizes"]
    assert features["num_img_tokens"] == recorded["num_img_tokens"]
    counts = [1 + height * width // 336**2 for height, width in recorded["image_sizes"]]
    means = np.zeros(recorded["shape"][:2])  # the official layout pads each image with empty crops
    for row, crops in zip(means, features["pixel_values"].split(counts), strict=True):
        row[: len(crops)] = crops.double().mean((1, 2, 3))
    check(record_property, "crop mean, several images", means, arrays("image_processor")["multi/mean"], 1e-6)


def test_sizes_and_token_counts_of_the_whole_table():
    processor = Phi3VImageProcessor()
    for row in arrays("hd_table")["table"].tolist():
        width, height, num_crops, *resized_landscape, hd_width, hd_height, tokens = row
        resized = hd_size(width, height, num_crops)
        assert sorted(resized, reverse=True) == resized_landscape, row
        assert padded_size(*resized) == (hd_width, hd_height), row
        assert processor.calc_num_image_tokens_from_image_size(width, height, num_crops) == tokens, row


@pytest.mark.parametrize("row", manifest("hd_table")["extreme"], ids=lambda row: "{}x{}_nc{}".format(*row))
def test_extreme_images_as_the_official_code_or_one_row_where_it_fails(row):
    width, height, num_crops, result, official = row
    resized = hd_size(width, height, num_crops)
    if result == "ok":
        assert list(padded_size(*resized)) == official
    else:
        assert sorted(resized)[0] == 1
        assert min(padded_size(*resized)) == 336
