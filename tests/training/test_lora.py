"""The LoRA layers of a run against PEFT's own: same outputs, gradients, merged weights and files."""

import pytest
import recipe
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from finetuning.training.loading import load_model


@pytest.fixture(autouse=True)
def own_process(tmp_path, monkeypatch):
    yield from recipe.own_process(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return recipe.model_folder(tmp_path_factory.mktemp("model") / "tiny", intermediate_size=128)


def adapted(folder, *flags):
    """A model with adapters none of whose weights is zero."""
    model = load_model(recipe.arguments(folder, "--use_lora", "--lora_rank", "4", "--deepspeed", "none", *flags))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def as_peft(model):
    """The same model, computed as PEFT does."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_variant, layer.cast_input_dtype_enabled = {}, True
    return model


def outcome(model, dtype: torch.dtype):
    """Loss and gradients of a text under autocast, as in training."""
    model.train()
    ids = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = model(input_ids=ids, labels=ids).loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = {
    "full": [],
    "dropout": ["--lora_dropout", "0.3"],
    "frozen vision": ["--freeze_vision_model"],
    "4 bits": ["--use_qlora"],
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_peft(folder, case):
    model = adapted(folder, *CASES[case])
    loss, gradients = outcome(model, torch.float32)
    expected_loss, expected = outcome(as_peft(model), torch.float32)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max()), name


@pytest.mark.parametrize("flags", [[], ["--use_qlora"]], ids=["16 bits", "4 bits"])
def test_bfloat16_rounds_no_more_than_in_peft(folder, flags):
    def gradients_of(computed):
        return torch.cat([gradient.flatten() for gradient in computed[1].values()])

    exact = gradients_of(outcome(adapted(folder, *flags), torch.float32))
    model = adapted(folder, "--bf16", *flags)
    ours, peft = (gradients_of(outcome(way(model), torch.bfloat16)) for way in (lambda found: found, as_peft))
    assert 0 < (ours - exact).norm() < 1.1 * (peft - exact).norm()


def test_inputs_are_not_copied_to_float32_under_autocast(folder):
    seen = []
    model = adapted(folder, "--bf16")
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    dropout = next(iter(layer.lora_dropout.values()))
    dropout.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].dtype))
    outcome(model, torch.bfloat16)
    assert seen
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("safe", [True, False])
def test_it_merges_unmerges_and_saves_as_peft(folder, tmp_path, safe):
    model = adapted(folder)
    ids = torch.arange(20, 32)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        assert not torch.allclose(base, expected, atol=1e-2)
        model.save_pretrained(str(tmp_path / "ours"))
        model.merge_adapter(safe_merge=safe)
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
        model.unmerge_adapter()
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
        merged = model.merge_and_unload(safe_merge=safe)
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4)
    peft = as_peft(adapted(folder))
    peft.save_pretrained(str(tmp_path / "peft"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    base_model = load_model(recipe.arguments(folder, "--deepspeed", "none"))
    loaded = PeftModel.from_pretrained(base_model, str(tmp_path / "ours"))
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-5)
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors")
