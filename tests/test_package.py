"""The package phi3v by itself: what it needs, and what it must not need."""

import subprocess
import sys
from pathlib import Path

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
