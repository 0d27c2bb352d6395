"""Phi3VProcessor against the official processor: prompts, image tokens, ids, and which inputs are refused."""

from itertools import groupby

import pytest
import torch
from golden import IMAGE_TOKEN_ID, OFFICIAL_FOLDER, arrays, case, check, image, input_ids, manifest, names

from demo import build_tokenizer
from phi3v import Phi3VImageProcessor, Phi3VProcessor

CASES = names("processor_text")


@pytest.fixture(scope="module")
def small_processor():
    """Official crops, a small tokenizer: enough for everything but the ids of the text."""
    return Phi3VProcessor(Phi3VImageProcessor(), build_tokenizer())


@pytest.fixture(scope="module")
def official_processor():
    if not (OFFICIAL_FOLDER / "tokenizer.json").exists():
        pytest.skip(f"the official tokenizer is not in {OFFICIAL_FOLDER}")
    return Phi3VProcessor.from_pretrained(OFFICIAL_FOLDER)


def inputs(recorded: dict) -> dict:
    images = [image(*entry) for entry in recorded["images"]]
    return {"text": recorded["prompt"], "images": images or None, "num_crops": recorded["num_crops"]}


@pytest.mark.parametrize("name", CASES)
def test_ids_are_the_official_ones(name, official_processor, record_property):
    recorded = case("processor_text", name)
    features = official_processor(**inputs(recorded))
    expected = input_ids(arrays("processor_text")[f"{name}/input_ids"]).view(1, -1)
    check(record_property, "input_ids", features["input_ids"], expected, 0)
    assert features["attention_mask"].all()
    assert official_processor.image_token_id == IMAGE_TOKEN_ID


@pytest.mark.parametrize("name", [name for name in CASES if case("processor_text", name)["kind"] == "chat"])
def test_chat_template_writes_the_official_prompt(name, small_processor):
    recorded = case("processor_text", name)
    prompt = small_processor.apply_chat_template(recorded["payload"], add_generation_prompt=True)
    assert prompt == recorded["prompt"]


@pytest.mark.parametrize("name", [name for name in CASES if case("processor_text", name)["images"]])
def test_image_tokens_are_as_many_and_in_the_official_order(name, small_processor):
    recorded = case("processor_text", name)
    features = small_processor(**inputs(recorded))
    official = arrays("processor_text")[f"{name}/input_ids"].reshape(-1).tolist()
    official = [(-value, len(list(run))) for value, run in groupby(official) if value < 0]
    is_image = features["input_ids"][0] == small_processor.image_token_id
    found = [len(list(run)) for value, run in groupby(is_image.tolist()) if value]
    assert found == [length for _, length in official]
    # The number of a tag picks its image; the official processor hands the images over in their own order instead.
    sizes = [recorded["image_sizes"][number - 1] for number, _ in official]
    assert features["image_sizes"].tolist() == sizes


ERRORS = {case["name"]: case for case in manifest("processor_text")["errors"]}
# Refused for the unequal lengths that the official tokenizer gives; tests/test_processing.py has our own rule.
del ERRORS["text_list_no_images"]
# There a tag without images becomes plain text, and lists of texts are not supported.
DIFFERENT = {"tag_but_images_none": "refused", "text_is_list_with_images": "accepted"}


@pytest.mark.parametrize("name", ERRORS)
def test_inputs_that_the_official_processor_refuses_are_refused(name, small_processor):
    recorded = ERRORS[name]
    images = recorded["images"] and [image(*entry) for entry in recorded["images"]]
    outcome = DIFFERENT.get(name, {"error": "refused", "ok": "accepted"}[recorded["result"]])
    if outcome == "accepted":
        assert isinstance(small_processor(recorded["text"], images)["input_ids"], torch.Tensor)
    else:
        with pytest.raises(ValueError, match="expected"):
            small_processor(recorded["text"], images)
