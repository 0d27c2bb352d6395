"""What the five scripts have in common, because users copy them: one main(), a docstring that opens with a command."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("finetune_hf_trainer_*.py"))


def main_of(path: Path) -> str:
    """Source of a script's main(), without a task's own defaults."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    for node in ast.walk(main):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "parse_args":
            node.keywords = []
    return ast.unparse(main)


def test_there_are_five_scripts():
    assert [path.stem.removeprefix("finetune_hf_trainer_") for path in SCRIPTS] == [
        "docvqa",
        "hateful_memes",
        "nlvr2",
        "own_data",
        "ucf101",
    ]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_main_is_the_same_in_every_script(path):
    assert main_of(path) == main_of(SCRIPTS[0])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_opens_with_a_command_and_defines_its_task(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert "torchrun --nproc_per_node" in ast.get_docstring(tree)
    assert path.name in ast.get_docstring(tree)
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    names |= {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}
    assert {"load_splits", "to_conversation", "score", "main"} <= names
    assert len(text.splitlines()) <= 120
