"""Loss scaling that finds no scale, and the groups of an 8-bit optimizer under DeepSpeed."""

from types import SimpleNamespace

import pytest
import recipe
import torch

from finetuning.errors import RunError
from finetuning.training import trainer as trainer_module
from finetuning.training.callbacks import OVERFLOWS_IN_A_ROW, NonFiniteCheck
from finetuning.training.trainer import RecipeTrainer


@pytest.fixture(autouse=True)
def own_process(tmp_path, monkeypatch):
    yield from recipe.own_process(tmp_path, monkeypatch)


def step(check: NonFiniteCheck, gradient: float) -> None:
    """A step in float16 whose loss is finite."""
    model = torch.nn.Linear(1, 1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    args = SimpleNamespace(fp16=True, deepspeed_config=None, on_nonfinite="stop", output_dir="nowhere")
    check.note(["row"], torch.tensor(1.0))
    check.on_pre_optimizer_step(args, SimpleNamespace(global_step=6, is_world_process_zero=True), None, model, None)


def test_a_scale_is_looked_for_but_not_for_ever():
    check = NonFiniteCheck()
    for _ in range(3):
        for _ in range(OVERFLOWS_IN_A_ROW - 1):
            step(check, torch.inf)
        # found
        step(check, 1.0)
    for _ in range(OVERFLOWS_IN_A_ROW - 1):
        step(check, torch.inf)
    with pytest.raises(RunError, match="step 7: the gradients overflow float16 16 times in a row.*--bf16"):
        step(check, torch.nan)


@pytest.mark.parametrize(
    ("optimizer", "deepspeed", "groups"),
    [("paged_adamw_8bit", True, 5), ("paged_adamw_8bit", False, 2), ("adamw_torch_fused", True, 2)],
)
def test_groups_of_an_8_bit_optimizer_stay_small_under_deepspeed(tmp_path, monkeypatch, optimizer, deepspeed, groups):
    monkeypatch.setattr(trainer_module, "LARGEST_GROUP", 100)
    folder = recipe.model_folder(tmp_path / "model")
    args = recipe.arguments(folder, "--optim", optimizer, *([] if deepspeed else ["--deepspeed", "none"]))
    # Of 64, 64, 64 and 2,048 weights, and biases; the weights alone decay.
    sizes = [(8, 8), (8, 8), (8, 8), (32, 64)]
    model = torch.nn.Sequential(*(torch.nn.Linear(*size) for size in sizes))
    made = RecipeTrainer(model=model, args=args).create_optimizer()
    found = [(group["weight_decay"], sum(p.numel() for p in group["params"])) for group in made.param_groups]
    assert len(found) == groups
    assert sum(size for _, size in found) == sum(p.numel() for p in model.parameters())
    assert {decay for decay, _ in found} == {0, args.weight_decay}
    if groups == 5:
        assert [size for _, size in found] == [64, 64, 64, 2048, 8 + 8 + 8 + 64]
