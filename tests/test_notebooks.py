"""The notebooks as they are kept: no outputs, no traces of where they were run, and only code that can run."""

import ast
import json
import re

import pytest
import recipe

NOTEBOOKS = sorted((recipe.ROOT / "notebooks").glob("*.ipynb"))


def faults(notebook: dict) -> list[str]:
    """What of a notebook has no place in git."""
    found = [] if set(notebook["metadata"]) <= {"accelerator", "colab", "kernelspec", "language_info"} else ["metadata"]
    if set(notebook["metadata"].get("language_info", {})) - {"name"}:
        found.append("the version of whoever ran it")
    for number, cell in enumerate(notebook["cells"]):
        if cell.get("outputs") or cell.get("execution_count") is not None:
            found.append(f"cell {number}: outputs; clear all outputs and save")
        if cell["metadata"] or cell.get("attachments"):
            found.append(f"cell {number}: metadata or attachments")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_without_outputs_and_its_code_parses(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert faults(notebook) == []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            # A command of the shell, with the lines that go on after a backslash, stands for no Python.
            ast.parse(re.sub(r"^(\s*)!(?:[^\n]*\\\n)*[^\n]*", r"\1pass", "".join(cell["source"]), flags=re.MULTILINE))


def test_the_check_itself_finds_what_it_looks_for():
    cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": []}
    clean = {"metadata": {"language_info": {"name": "python"}}, "cells": [cell]}
    assert faults(clean) == []
    for changed in (
        {**cell, "outputs": [{"output_type": "stream"}]},
        {**cell, "execution_count": 1},
        {**cell, "metadata": {"id": "x"}},
    ):
        assert faults({**clean, "cells": [cell, changed]}), changed
    assert faults({**clean, "metadata": {"widgets": {}}})
    assert faults({**clean, "metadata": {"language_info": {"name": "python", "version": "3.11"}}})
    assert [path.name for path in NOTEBOOKS] == ["own_pages.ipynb"]
