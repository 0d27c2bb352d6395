"""What an adapter's folder holds for others: an adapter_config.json for PEFT 0.12, and after a merge a whole model's folder."""

import json

import pytest
import recipe
import tiny
import torch
from peft import LoraConfig, PeftConfig, PeftModel

from finetuning.training.loading import load_model, load_processor
from finetuning.training.lora import PEFT_0_12
from finetuning.training.parts import LORA_TARGETS
from phi3v import Phi3VForCausalLM, Phi3VProcessor

own_process = pytest.fixture(autouse=True)(recipe.own_process)


@pytest.fixture
def base(tmp_path):
    return recipe.model_folder(tmp_path / "base")


def adapter(base, folder, *flags: str):
    """A model with an adapter that does something, and its folder."""
    model = load_model(recipe.arguments(base, "--use_lora", "--lora_rank", "4", *flags)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(str(folder))
    load_processor(recipe.arguments(base)).save_pretrained(folder)
    return model


def inputs():
    return tiny.processor(num_crops=2)("<|image_1|>\nWhat?", tiny.picture(60, 40))


def test_adapter_config_holds_only_what_peft_0_12_takes(base, tmp_path):
    adapter(base, tmp_path / "adapter")
    found = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert found.keys() <= PEFT_0_12
    assert (found["r"], found["lora_alpha"], found["base_model_name_or_path"]) == (4, 8, str(base))


def test_a_setting_that_peft_0_12_does_not_know_is_not_dropped_where_it_matters(base, tmp_path):
    model = adapter(base, tmp_path / "first")
    model.peft_config["default"].lora_bias = True
    model.save_pretrained(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_bias"] is True


def test_the_adapter_is_read_by_peft_as_it_was(base, tmp_path):
    model = adapter(base, tmp_path / "adapter")
    config = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    default = LoraConfig().to_dict()
    expected = {key: value for key, value in model.peft_config["default"].to_dict().items() if key != "inference_mode"}
    found = config.to_dict()
    assert {key: found.get(key, default.get(key)) for key in expected} == expected
    again = PeftModel.from_pretrained(Phi3VForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs()).logits, model(**inputs()).logits)


@pytest.mark.parametrize("flags", [[], ["--freeze_vision_model"]], ids=["all", "frozen vision"])
def test_the_targets_are_all_layers_of_these_names_but_those_never_run(base, tmp_path, flags):
    model = adapter(base, tmp_path / "adapter", *flags)
    parts = ["language"] if flags else ["language", "projector", "vision"]
    names = [name for part in parts for name in LORA_TARGETS[part]]
    last = ".vision_model.encoder.layers.2."
    plain = Phi3VForCausalLM.from_pretrained(base)
    expected = {
        name
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear)
        and last not in name
        and any(name == target or name.endswith(f".{target}") for target in names)
    }
    assert set(model.targeted_module_names) == expected
    assert len(expected) == (9 if flags else 9 + 12 + 2)


def test_merged_as_the_readme_says_it_is_a_whole_folder(base, tmp_path):
    model = adapter(base, tmp_path / "adapter")
    with torch.no_grad():
        expected = model(**inputs()).logits
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    Phi3VProcessor.from_pretrained(tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    assert {path.name for path in base.iterdir()} == {path.name for path in (tmp_path / "merged").iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes(), name
    stop = [json.loads((folder / "generation_config.json").read_text()) for folder in (base, tmp_path / "merged")]
    assert stop[0]["eos_token_id"] == stop[1]["eos_token_id"]
    merged = Phi3VForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs()).logits, expected, atol=1e-4, rtol=0)
