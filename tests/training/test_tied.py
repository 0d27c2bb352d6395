"""A model whose head and embedding are one weight: adapters on it, merging them, and full fine-tuning."""

import sys
from pathlib import Path

import pytest
import recipe
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import finetune_hf_trainer_docvqa as script
from phi3v import Phi3VForCausalLM

own_process = pytest.fixture(autouse=True)(recipe.own_process)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# A merged product is rounded once more. What PEFT merges into a weight that is shared is off by 1 and more.
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return recipe.model_folder(tmp_path_factory.mktemp("model") / "tied", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return recipe.docvqa_rows(tmp_path_factory.mktemp("data") / "docvqa", train=8, test=1)


def load(folder) -> Phi3VForCausalLM:
    return Phi3VForCausalLM.from_pretrained(folder, attn_implementation="eager")


def is_tied(model) -> bool:
    shared = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert shared == model.config.tie_word_embeddings
    return shared


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**tiny.processor(2)("<|image_1|> what?", tiny.picture(60, 40))).logits


def fine_tune(folder, data, output: str, monkeypatch, *flags: str) -> Path:
    monkeypatch.setattr(sys, "argv", [
        "finetune_hf_trainer_docvqa.py", "--model_name_or_path", str(folder), "--data_dir", str(data), "--output_dir", output,
        "--num_crops", "1", "--batch_size", "4", "--max_steps", "4", "--save_steps", "2", "--warmup_steps", "0",
        "--learning_rate", "1e-2", "--max_new_tokens", "2", "--deepspeed", "none", "--no-tqdm", *flags,
    ])  # fmt: skip
    script.main()
    return Path(output)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head", "embed_tokens", "qkv_proj"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["qkv_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_an_adapter_of_pefts_own_merges_into_what_it_was(folder, settings, tmp_path):
    model = load(folder)
    assert is_tied(model)
    before = logits(model)
    adapted = get_peft_model(model, LoraConfig(r=4, **settings))
    assert torch.equal(logits(adapted), before)
    torch.manual_seed(0)
    for parameter in (parameter for parameter in adapted.parameters() if parameter.requires_grad):
        parameter.data += 0.05 * torch.randn_like(parameter)
    expected = logits(adapted)
    assert (expected - before).abs().max() > 0.1
    adapted.save_pretrained(tmp_path / "adapter")

    for safe in (False, True):
        again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
        torch.testing.assert_close(logits(again), expected, **CLOSE)
        merged = again.merge_and_unload(safe_merge=safe)
        assert not is_tied(merged)
        torch.testing.assert_close(logits(merged), expected, **CLOSE)
        merged.save_pretrained(tmp_path / "merged")
        reloaded = load(tmp_path / "merged")
        assert not is_tied(reloaded)
        assert torch.equal(logits(reloaded), logits(merged))


def test_adapters_elsewhere_leave_it_tied(folder, tmp_path):
    adapted = get_peft_model(load(folder), LoraConfig(target_modules=["qkv_proj"], init_lora_weights=False))
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    assert is_tied(merged)
    merged.save_pretrained(tmp_path)
    assert is_tied(load(tmp_path))
    torch.testing.assert_close(logits(load(tmp_path)), expected, **CLOSE)


@pytest.mark.parametrize("flags", [["--use_lora"], ["--use_qlora"]], ids=["lora", "qlora"])
def test_lora_of_the_recipe_trains_and_merges(folder, data, flags, monkeypatch):
    output = fine_tune(folder, data, "lora", monkeypatch, "--lora_rank", "4", *flags)
    adapted = PeftModel.from_pretrained(load(folder), output)
    expected = logits(adapted)
    assert (expected - logits(load(folder))).abs().max() > 0.1
    merged = adapted.merge_and_unload()
    merged.save_pretrained("merged")
    torch.testing.assert_close(logits(load("merged")), expected, **CLOSE)
    assert not is_tied(load("merged"))
    # and as a base of the recipe
    tiny.processor().save_pretrained("merged")
    fine_tune("merged", data, "again", monkeypatch, "--max_steps", "1", "--eval_size", "0")


def test_full_fine_tuning_keeps_one_weight_saves_it_once_and_goes_on_with_it(folder, data, monkeypatch):
    output = fine_tune(folder, data, "full", monkeypatch)
    weights = load_file(output / "model.safetensors")
    assert EMBEDDING in weights
    assert HEAD not in weights
    model = load(output)
    assert is_tied(model)
    assert torch.equal(model.get_output_embeddings().weight, weights[EMBEDDING])
    assert (logits(model) - logits(load(folder))).abs().max() > 0.1

    on = fine_tune(folder, data, "on", monkeypatch, "--resume_from_checkpoint", str(output / "checkpoint-2"))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(on / "model.safetensors").items())
