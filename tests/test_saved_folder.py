"""What a saved folder holds for other readers: transformers 4.x, the official code, `pipeline`; and that nobody is asked to run code."""

import builtins
import json
import sys
from pathlib import Path

import pytest
import tiny
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from phi3v import Phi3VConfig, Phi3VProcessor
from phi3v.processing_phi3_v import CHAT_TEMPLATE

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from golden import OFFICIAL_FOLDER  # noqa: E402

HUB = "microsoft/Phi-3.5-vision-instruct--"
TEXT = "<|user|>\nWhat  is the number? é <|end|>\n  two"
needs_official = pytest.mark.skipif(not OFFICIAL_FOLDER.exists(), reason="needs ../shared/phi35v")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with model and processor, as any run saves it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny.model().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    """A processor's folder whose files nobody would write again in the same way, with a file that transformers 5 does not write."""
    folder = tmp_path / "base"
    tiny.processor().save_pretrained(folder)
    tokenizer = read(folder / "tokenizer.json")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=7))
    (folder / "special_tokens_map.json").write_text('{"bos_token": \n "<s>"}')
    config = read(folder / "tokenizer_config.json") | {"sp_model_kwargs": {}, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_the_tokenizer_files_are_those_that_it_was_loaded_from(base, tmp_path):
    Phi3VProcessor.from_pretrained(base).save_pretrained(tmp_path / "to")
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert (tmp_path / "to" / name).read_bytes() == (base / name).read_bytes(), name
    assert read(tmp_path / "to" / "tokenizer_config.json") == read(base / "tokenizer_config.json")


def test_saving_over_the_folder_that_was_loaded_keeps_its_files(base):
    before = {name: (base / name).read_bytes() for name in ("tokenizer.json", "special_tokens_map.json")}
    Phi3VProcessor.from_pretrained(base).save_pretrained(base)
    assert {name: (base / name).read_bytes() for name in before} == before


@needs_official
def test_of_the_official_files_only_what_names_code_differs(tmp_path):
    Phi3VProcessor.from_pretrained(OFFICIAL_FOLDER).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_bytes() == (OFFICIAL_FOLDER / name).read_bytes(), name
    changed = {
        "tokenizer_config.json": {"auto_map", "chat_template", "tokenizer_class"},
        "preprocessor_config.json": {"auto_map", "crop_size"},
        "processor_config.json": {"auto_map"},
    }
    for name, keys in changed.items():
        found, official = read(tmp_path / name), read(OFFICIAL_FOLDER / name)
        assert {key for key in found.keys() | official.keys() if found.get(key) != official.get(key)} == keys, name


@needs_official
def test_without_a_config_as_beside_an_adapter_the_official_tokenizer_gives_the_same_ids(tmp_path):
    official = Phi3VProcessor.from_pretrained(OFFICIAL_FOLDER)
    official.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    for tokenizer in (AutoProcessor.from_pretrained(tmp_path).tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer(TEXT).input_ids == official.tokenizer(TEXT).input_ids


def test_what_transformers_5_wrote_or_has_lost_is_translated_for_4(tmp_path):
    processor = tiny.processor()
    processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>"]})
    folder = tmp_path / "written_by_5"
    # Not by Phi3VProcessor: the class of the tokenizer, merges and special tokens are then those of transformers 5.
    processor.tokenizer.save_pretrained(folder)
    assert isinstance(read(folder / "tokenizer.json")["model"]["merges"][0], list)
    for number, tokenizer in enumerate((processor.tokenizer, AutoTokenizer.from_pretrained(folder))):
        to = tmp_path / f"{number}"
        Phi3VProcessor(processor.image_processor, tokenizer).save_pretrained(to)
        merges, config = read(to / "tokenizer.json")["model"]["merges"], read(to / "tokenizer_config.json")
        assert merges == [" ".join(pair) for pair in read(folder / "tokenizer.json")["model"]["merges"]]
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert config["additional_special_tokens"] == ["<|user|>"]
        assert not {"extra_special_tokens", "backend", "is_local"} & config.keys()
        again = AutoProcessor.from_pretrained(to).tokenizer
        assert again(TEXT).input_ids == processor.tokenizer(TEXT).input_ids
        assert again.extra_special_tokens == ["<|user|>"]


def test_a_tokenizer_that_has_learnt_a_token_is_saved_with_it(base, tmp_path):
    processor = Phi3VProcessor.from_pretrained(base)
    processor.tokenizer.add_tokens(["<|new|>"])
    processor.save_pretrained(tmp_path / "to")
    assert Phi3VProcessor.from_pretrained(tmp_path / "to").tokenizer.convert_tokens_to_ids("<|new|>") == len(
        tiny.TOKENIZER
    )


def test_what_was_set_after_loading_is_saved(base, tmp_path):
    processor = Phi3VProcessor.from_pretrained(base)
    processor.tokenizer.padding_side = "left"
    processor.tokenizer.pad_token = "<unk>"
    processor.save_pretrained(tmp_path / "to")
    again = Phi3VProcessor.from_pretrained(tmp_path / "to").tokenizer
    assert (again.padding_side, again.pad_token) == ("left", "<unk>")


def test_the_chat_template_is_where_old_and_new_readers_look(saved):
    assert (saved / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert read(saved / "tokenizer_config.json")["chat_template"] == CHAT_TEMPLATE


def test_auto_map_names_the_official_code_on_the_hub_and_no_file_that_is_not_there(saved):
    found = {path.name: read(path)["auto_map"] for path in saved.glob("*.json") if "auto_map" in read(path)}
    assert found == {
        "config.json": {
            "AutoConfig": f"{HUB}configuration_phi3_v.Phi3VConfig",
            "AutoModelForCausalLM": f"{HUB}modeling_phi3_v.Phi3VForCausalLM",
        },
        **{
            name: {"AutoProcessor": f"{HUB}processing_phi3_v.Phi3VProcessor"}
            for name in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json")
        },
    }


def test_the_configs_hold_the_official_fields(saved):
    config = read(saved / "config.json")
    assert config["model_type"] == "phi3_v"
    assert config["architectures"] == ["Phi3VForCausalLM"]
    assert sorted(config["rope_scaling"]) == ["long_factor", "short_factor", "type"]
    assert config["rope_scaling"]["type"] == "su"
    assert config["rope_theta"] == 10000.0
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert {"embd_layer", "img_processor", "embd_pdrop", "sliding_window", "tie_word_embeddings"} <= config.keys()
    assert "rope_parameters" not in config
    images = read(saved / "preprocessor_config.json")
    assert images["processor_class"] == "Phi3VProcessor"
    assert images["image_processor_type"] == "Phi3VImageProcessor"
    assert {"image_mean", "image_std", "num_crops", "num_img_tokens", "do_convert_rgb"} <= images.keys()
    # With the image processor in it, as transformers 5 writes it, transformers 4.x calls the processor with it twice.
    assert read(saved / "processor_config.json").keys() == {"auto_map", "processor_class"}
    stop = {tiny.TOKENIZER.convert_tokens_to_ids(token) for token in ("<|end|>", "<|endoftext|>")}
    assert set(read(saved / "generation_config.json")["eos_token_id"]) == stop


def test_a_config_that_was_saved_and_read_is_saved_the_same(saved, tmp_path):
    Phi3VConfig.from_pretrained(saved).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (saved / "config.json").read_bytes()


def test_nobody_is_asked_whether_to_run_code(saved, monkeypatch):
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "n")
    AutoConfig.from_pretrained(saved)
    assert type(AutoProcessor.from_pretrained(saved)) is Phi3VProcessor
    AutoTokenizer.from_pretrained(saved)
    AutoModelForCausalLM.from_pretrained(saved)
    answer = transformers.pipeline("image-text-to-text", str(saved))
    content = [{"type": "image", "image": tiny.picture(40, 30)}, {"type": "text", "text": "What is it?"}]
    answer(text=[{"role": "user", "content": content}], max_new_tokens=2)
    assert not asked


def test_it_is_pushed_when_it_is_complete(base, tmp_path, monkeypatch):
    pushed = []

    def files():
        return {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()}

    def push(_, *args, **kwargs):
        pushed.append((args, kwargs, files()))

    monkeypatch.setattr(Phi3VProcessor, "push_to_hub", push)
    Phi3VProcessor.from_pretrained(base).save_pretrained(tmp_path / "to", push_to_hub=True, private=True)
    assert pushed == [(("to",), {"private": True}, files())]
