"""notebooks/own_pages.ipynb, every cell run with the tiny model on a CPU, as a user runs it.

For an environment with nbclient (make test-notebook); skipped without it.
"""

import os
import sys
from pathlib import Path

import pytest
import recipe

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The notebook after all its cells have run, in the repository, with everything that it writes elsewhere."""

    def run_one(**settings):
        for name in recipe.LAUNCHER:
            monkeypatch.delenv(name, raising=False)
        own = {"MODEL": str(recipe.model_folder(tmp_path / "model")), "DATA": str(tmp_path / "pages")}
        own |= {"OUTPUT": str(tmp_path / "output"), "PRECISION": "", "CROPS": "2", "EPOCHS": "2", "INSTALL": ""}
        own |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_ASSETS_CACHE": str(tmp_path / "assets")}
        # As with the environment activated.
        own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        for name, value in {**own, **settings}.items():
            monkeypatch.setenv(name, value)
        notebook = nbformat.read(recipe.ROOT / "notebooks" / "own_pages.ipynb", as_version=4)
        folder = {"metadata": {"path": str(recipe.ROOT / "notebooks")}}
        nbclient.NotebookClient(notebook, timeout=250, kernel_name="python3", resources=folder).execute()
        return notebook

    return run_one


def printed(cell) -> str:
    return "".join(output["text"] for output in cell["outputs"] if output["output_type"] == "stream")


def pictures(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


def test_every_cell_runs_and_leads_to_an_answer(run, tmp_path):
    before = {path for path in recipe.ROOT.iterdir() if not path.name.startswith(".")}
    notebook = run()
    *_, pages, plan, train, look, ask = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert printed(pages).startswith(f"20 rows in {tmp_path / 'pages' / 'rows.csv'}")
    assert pictures(pages) == 3
    assert "--use_lora --use_qlora" in printed(plan)
    (fits,) = [line for line in printed(plan).splitlines() if line.startswith("your flags")]
    assert fits.endswith(": fits"), printed(plan)
    assert "report ->" in printed(train), printed(train)
    assert pictures(look) == 1
    assert "before {" in printed(look)
    assert "after {" in printed(look)
    assert "tokens/s" in printed(ask), printed(ask)
    assert "expected: " in printed(ask)
    assert (tmp_path / "output" / "adapter_model.safetensors").exists()
    assert {path for path in recipe.ROOT.iterdir() if not path.name.startswith(".")} == before
