"""The package phi3v by itself: what it needs, and what it must not need."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# What another environment may lack, and the room above.
NOT_NEEDED = ("accelerate", "peft", "deepspeed", "torchvision", "datasets", "bitsandbytes", "finetuning")

HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *args: None if name.split(".")[0] in {names} else find(name, *args))
"""
STEP = """
import torch
from phi3v import Phi3VConfig, Phi3VForCausalLM
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
vision = {**sizes, "image_size": 28, "patch_size": 7}
config = Phi3VConfig(**sizes, num_key_value_heads=2, vocab_size=100, pad_token_id=0, image_token_id=99, end_token_id=98,
                     vision_config=vision)
model = Phi3VForCausalLM(config)
ids = torch.tensor([[1, *[99] * 13, 5]])
model(ids, pixel_values=torch.rand(2, 3, 28, 28), image_sizes=torch.tensor([[28, 28]]), labels=ids).loss.backward()
"""


def run_without(names: tuple[str, ...], then: str) -> subprocess.CompletedProcess:
    """Runs a program in a process that finds none of these modules."""
    source = HIDE.format(names=set(names)) + then
    return subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)


def test_phi3v_trains_a_step_without_the_libraries_that_only_the_recipe_needs():
    done = run_without(NOT_NEEDED, STEP)
    assert done.returncode == 0, done.stderr


def test_the_check_itself_notices_a_missing_library():
    done = run_without(("safetensors",), STEP)
    assert done.returncode == 1
    assert "No module named 'safetensors" in done.stderr


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def bounds(*groups: list[str]) -> dict[str, list[Requirement]]:
    """Requirements by name; a library may stand in several groups."""
    found = {}
    for requirement in map(Requirement, sum(groups, [])):
        found.setdefault(requirement.name, []).append(requirement)
    return found


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


# Come with transformers, which says which versions it takes.
WITH_TRANSFORMERS = {"huggingface_hub", "tokenizers"}


@pytest.mark.parametrize("name", sorted(pins().keys() - WITH_TRANSFORMERS))
def test_what_is_tested_is_within_the_bounds_of_the_package(name):
    allowed = bounds(PROJECT["dependencies"], PROJECT["optional-dependencies"]["finetuning"])
    assert name in allowed, f"{name} is in requirements.txt and not in pyproject.toml"
    for requirement in allowed[name]:
        assert requirement.specifier.contains(pins()[name]), requirement


def test_the_oldest_transformers_that_is_tested_is_the_oldest_that_is_allowed():
    (transformers,) = bounds(PROJECT["dependencies"])["transformers"]
    oldest = re.search(r"^VERSIONS = (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    (lower,) = [bound.version for bound in transformers.specifier if bound.operator == ">="]
    assert oldest.startswith(lower + ".")


def test_the_plugin_that_vllm_is_told_of_exists_and_imports_without_vllm():
    ((name, target),) = PROJECT["entry-points"]["vllm.general_plugins"].items()
    module, function = target.split(":")
    then = f"import importlib\nassert callable(getattr(importlib.import_module({module!r}), {function!r}))"
    assert name == "phi3v"
    done = run_without(("vllm",), then)
    assert done.returncode == 0, done.stderr
