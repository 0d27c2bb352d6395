"""`python -m finetuning.app`, as far as that needs no gradio: its call, how models are loaded, which rows it lists."""

import json
import socket
import sys

import pytest
import recipe
import saved
import torch

from finetuning import app
from finetuning.errors import InputError
from finetuning.results.report import REPORT
from finetuning.training.identity import write_run
from finetuning.training.saved import find_saved

own_process = pytest.fixture(autouse=True)(recipe.own_process)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipe.model_folder(tmp_path_factory.mktemp("app") / "base")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "the following arguments are required: FOLDER"),
        (["gone/away/far"], "FOLDER gone/away/far: no such folder"),
        ([".", "--port", "70000"], "--port 70000: expected 1 to 65535"),
        ([".", "--max_new_tokens", "0"], "--max_new_tokens 0: expected 1 to 2048"),
        ([".", "--max_upload_mb", "0"], "--max_upload_mb 0: expected 1 to 1000"),
        (["."] * 5, "expected 1 to 4 folders, found 5"),
        ([".", "--share"], "unrecognized arguments: --share"),
    ],
)
def test_a_bad_call_gets_one_line(argv, says):
    with pytest.raises(InputError) as caught:
        app.parse_args(argv)
    assert says in str(caught.value)


def test_without_gradio_the_line_says_how_to_install_it(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install -r requirements-app.txt" in saved.refusal(monkeypatch, app, base)


def test_a_port_that_is_taken_is_told_and_a_free_one_is_found():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}, found: Address already in use; choose another"):
            app.find_port("127.0.0.1", port)
    assert app.find_port("127.0.0.1", None) in app.PORTS
    with pytest.raises(InputError, match="--host 203.0.113.7"):
        app.find_port("203.0.113.7", None)


def test_names_tell_folders_apart():
    assert app.names_of(["output/a", "b/"]) == ["a", "b"]
    assert app.names_of(["one/run", "two/run", "c"]) == ["one/run", "two/run", "c"]


def test_a_base_without_a_run_is_loaded_as_the_adapter_over_it_was_trained(base, tmp_path):
    adapter = saved.adapter_folder(base, tmp_path / "adapter")
    settings = {"bf16": True, "use_qlora": True, "model_name_or_path": str(base)}
    write_run(adapter, {"script": "x.py", "settings": settings, "spread": {}, "rows": {}, "started": ""})
    both = [find_saved(str(folder)) for folder in (base, adapter)]

    def how(*argv):
        loadings = app.how_to_load(app.parse_args([str(base), *argv]), both, CPU)
        return [(item.dtype, item.in_4_bits) for item in loadings]

    assert how() == [(torch.bfloat16, True)] * 2
    assert how("--quantize", "none", "--dtype", "float32") == [(torch.float32, False)] * 2
    (alone,) = app.how_to_load(app.parse_args([str(base)]), both[:1], CPU)
    assert (alone.dtype, alone.in_4_bits) == (torch.float32, False)


def run_of(script: str, *flags: str) -> dict:
    command = ["torchrun", "--nproc_per_node=2", f"somewhere/{script}", *flags]
    return {"script": script, "attempts": [{"command": command}]}


def test_the_rows_of_a_run_are_read_by_its_own_script(tmp_path):
    folder = recipe.docvqa_rows(tmp_path / "data")
    rows, to_conversation = app.answered_rows(run_of("finetune_hf_trainer_docvqa.py", "--data_dir", str(folder)))
    assert [to_conversation(row).id for row in rows] == [f"page-{number}" for number in range(10, 15)]


def test_the_rows_of_ones_own_data_are_those_that_were_drawn(tmp_path, capsys):
    folder = recipe.docvqa_rows(tmp_path / "data", train=20, test=0)
    lines = [f"images/{number}.png,Which page?,{number}" for number in range(20)]
    (folder / "rows.jsonl").unlink()
    (folder / "rows.csv").write_text("\n".join(["image,question,answer", *lines]) + "\n")
    flags = ["--data_dir", str(folder), "--eval_share", "0.3"]
    rows, to_conversation = app.answered_rows(run_of("finetune_hf_trainer_own_data.py", *flags))
    assert 2 <= len(rows) <= 12
    assert to_conversation(rows[0]).turns[0].user == "Which page?"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (run_of("finetune_hf_trainer_docvqa.py"), "found one on a data set of the hub"),
        (run_of("finetune_hf_trainer_docvqa.py", "--data_dir", "gone"), "--data_dir gone: no such folder"),
        (run_of("my_own.py"), "found one of my_own.py"),
        ({"script": "../../etc/x.py", "attempts": [{"command": []}]}, "found one of x.py"),
    ],
)
def test_rows_that_cannot_be_read_again_are_told(run, says):
    with pytest.raises(InputError, match=says):
        app.answered_rows(run)


def test_a_page_without_rows_to_click_says_why(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({}))
    assert app.find_examples([str(tmp_path / "model"), str(tmp_path / "run"), "a/name-on-the-hub"]) == []
    (line,) = capsys.readouterr().out.splitlines()
    assert f"run: no rows to click: {tmp_path / 'run'}: expected {REPORT}" in line
