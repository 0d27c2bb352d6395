"""The demo's tiny model, tokenizer and pages: what `make demo` and most tests stand on."""

import filecmp
import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

import demo
from phi3v import Phi3VForCausalLM

OFFICIAL = Path(__file__).parents[2] / "shared" / "phi35v"


def test_the_tokenizer_treats_special_tokens_as_the_official_one_does():
    tokenizer = demo.build_tokenizer()
    ids = tokenizer("<|assistant|>\n12<|end|>\n").input_ids
    # BOS by itself, no token for the line end after <|assistant|>, one after <|end|>.
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["<s>", "<|assistant|>"]
    assert ids == tokenizer("<|assistant|>12<|end|>\n").input_ids
    assert ids != tokenizer("<|assistant|>12<|end|>").input_ids
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"


@pytest.mark.parametrize("text", ["What is it?", "Überprüfe 漢字 👩‍🚀", "a  b\tc"])
def test_any_text_survives_the_tokenizer(text):
    tokenizer = demo.build_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.skipif(not OFFICIAL.exists(), reason="needs ../shared")
def test_the_special_tokens_have_the_official_flags():
    official = AutoTokenizer.from_pretrained(OFFICIAL).added_tokens_decoder.values()
    flags = {token.content: (token.special, token.rstrip, token.lstrip, token.normalized) for token in official}
    for token in demo.build_tokenizer().added_tokens_decoder.values():
        assert (token.special, token.rstrip, token.lstrip, token.normalized) == flags[token.content], token.content


def test_the_data_are_the_same_for_the_same_seed(tmp_path):
    first, second = (demo.build_data(tmp_path / name, num_train=6, num_test=3) for name in ("first", "second"))
    names = [path.relative_to(first) for path in sorted(first.rglob("*")) if path.is_file()]
    assert len(names) == 10
    assert filecmp.cmpfiles(first, second, names, shallow=False) == (names, [], [])
    rows = [json.loads(line) for line in (first / "rows.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["train"] * 6 + ["test"] * 3
    assert all(row["answers"][0].isdigit() for row in rows)


def test_no_digit_of_a_test_page_is_on_a_train_page():
    parts = demo.split_digits(0)
    assert not set(parts["train"]) & set(parts["test"])
    assert len(parts["train"]) + len(parts["test"]) == 1797


def test_the_model_folder_loads_and_answers_a_page(tmp_path):
    folder = demo.build_model(tmp_path / "model")
    data = demo.build_data(tmp_path / "data", num_train=1, num_test=1)
    model, processor = Phi3VForCausalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    prompt = "<|user|>\n<|image_1|>\nWhat is it?<|end|>\n<|assistant|>\n"
    inputs = processor(prompt, Image.open(data / "images" / "test_0000.png"))
    output = model.generate(**inputs, max_new_tokens=3)
    assert output.shape[1] > inputs["input_ids"].shape[1]
