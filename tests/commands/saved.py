"""What the tests of the commands share: a model folder, an adapter over it, and how a command is called."""

import sys
from pathlib import Path

import pytest
import recipe
import torch
from deepspeed.accelerator import get_accelerator

from finetuning.errors import InputError
from finetuning.training.loading import load_model

# At first use it prints a line to stdout, where a command's answer is looked for.
get_accelerator()


def adapter_folder(base: Path, folder: Path, *flags: str, scale: float = 0.05) -> Path:
    """An adapter over the model in `base`, none of its weights zero, as a run saves it."""
    args = recipe.arguments(base, "--use_lora", "--lora_rank", "4", "--do_train", "True", *flags)
    model = load_model(args)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    model.save_pretrained(folder)
    return folder


def call(monkeypatch, command, *argv: str) -> None:
    """Runs a command's `main` in this process."""
    monkeypatch.setattr(sys, "argv", [f"{command.__name__}.py", *map(str, argv)])
    command.main()


def refusal(monkeypatch, command, *argv: str) -> str:
    """The one line with which a command refuses a call."""
    with pytest.raises(InputError) as caught:
        call(monkeypatch, command, *argv)
    line = str(caught.value)
    assert "\n" not in line.strip()
    return line
