"""A script or its data is edited and the same command runs again: what is said, what is trained, what is left as it was."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import recipe
from launch import ROOT, Run, script, several

ROWS, QUESTIONS = 8, 3
STRATEGIES = {"full": ["--deepspeed", "none"], "lora": ["--use_lora", "--lora_rank", "4", "--lora_dropout", "0.1"]}
SOURCE = Path(script("docvqa")).read_text(encoding="utf-8")
ANSWERS = "parsed.answers"
SPLITS = 'return load_folder(args, evaluation=("test", "val"))'


@dataclass
class Edit:
    """A change before the second run.

    Args:
        said (list[str]): words of the line that refuses it; empty for one that is taken.
        source (dict): text of the script -> what it becomes.
        rows: changes the list of rows.
        touched (str): picture whose time changes.
        flags (list[str]): added to the command.
    """

    said: list[str] = field(default_factory=list)
    source: dict[str, str] = field(default_factory=dict)
    rows: object = None
    touched: str = ""
    flags: list[str] = field(default_factory=list)


def other_answer(rows):
    rows[2]["answers"] = ["another answer"]
    return rows


def other_question_to_answer(rows):
    rows[ROWS + 1]["query"] = {"en": "Another question?"}
    return rows


EDITS = {
    "prompt": Edit(
        [f"other prompts in {ROWS} of {ROWS} rows to train on", "shortly", "briefly", "page-0"],
        {"Answer briefly.": "Answer shortly."},
    ),
    "label": Edit([f"other answers in {ROWS} of {ROWS} rows"], {ANSWERS: '[text + "!" for text in parsed.answers]'}),
    "one answer": Edit([f"other answers in 1 of {ROWS} rows", "page-2", "another answer"], rows=other_answer),
    "one picture": Edit([f"other pictures in 1 of {ROWS} rows", "page-3"], touched="3.png"),
    "order of rows": Edit(["in another order"], rows=lambda rows: [rows[1], rows[0], *rows[2:]]),
    "a row more": Edit(["1 more rows to train on", "'new'"], rows=lambda rows: [{**rows[0], "id": "new"}, *rows]),
    "a row less": Edit(["1 rows to train on missing", "page-0"], rows=lambda rows: rows[1:]),
    "load_splits": Edit(
        ["2 rows to train on missing"],
        {SPLITS: SPLITS.replace("return ", "rows = ") + "\n        return rows[0][2:], rows[1]"},
    ),
    "a flag": Edit(["label_smoothing_factor 0.1 instead of 0.0"], flags=["--label_smoothing_factor", "0.1"]),
    "score": Edit(source={"/ len(predictions)}": "/ len(predictions) + 0.25}"}),
    "a question to answer": Edit(rows=other_question_to_answer),
}


def flags(model: Path, data: Path, strategy: str) -> list[str]:
    return [
        *("--model_name_or_path", str(model), "--data_dir", str(data), "--num_crops", "2", "--no-tqdm"),
        *("--batch_size", "4", "--num_train_epochs", "2", "--save_steps", "2", "--logging_steps", "1"),
        *("--learning_rate", "1e-2", "--warmup_steps", "0", "--max_new_tokens", "4", "--dataloader_num_workers", "0"),
        *STRATEGIES[strategy],
    ]


def write(folder: Path, edit: Edit | None = None) -> tuple[Path, Path]:
    """The script (a copy, as users make them) and its data, edited."""
    folder.mkdir()
    for package in ("finetuning", "phi3v", "ds_configs"):
        (folder / package).symlink_to(ROOT / package)
    data = recipe.docvqa_rows(folder / "data", ROWS, QUESTIONS)
    for path in sorted(data.rglob("*.png")):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    source, edit = SOURCE, edit or Edit()
    for old, new in edit.source.items():
        assert old in source
        source = source.replace(old, new)
    (folder / "my_task.py").write_text(source, encoding="utf-8")
    if edit.rows:
        rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
        recipe.write_jsonl(data / "rows.jsonl", edit.rows(rows))
    if edit.touched:
        os.utime(data / "images" / edit.touched)
    return folder / "my_task.py", data


def content(folder: Path) -> dict[str, str]:
    """Checksum of every file that a run has left."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights(folder: Path) -> dict[str, str]:
    return {name: value for name, value in content(folder).items() if name.endswith(".safetensors") and "/" not in name}


def stop_halfway(output: Path) -> None:
    """Leaves of a finished run what one that was killed after its second step leaves."""
    for path in output.iterdir():
        if (
            path.name.startswith(("checkpoint-4", "manifest", "eval_after", "report", "curves"))
            or path.suffix == ".safetensors"
        ):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["1 process", "2 processes"])
def ranks(request):
    return request.param


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    """(strategy, state, name of the edit) -> the folder before, what it held, and the second run."""
    folder = tmp_path_factory.mktemp("identity")
    model = recipe.model_folder(folder / "model")
    script_path, data = write(folder / "first")
    calls = {strategy: flags(model, data, strategy) for strategy in STRATEGIES}
    first = several(calls, folder, dict.fromkeys(calls, script_path), ranks=ranks)
    edited = {name: write(folder / name.replace(" ", "_"), edit) for name, edit in EDITS.items()}
    calls, paths, before = {}, {}, {}
    for strategy, run in first.items():
        assert run.status == 0, run.stderr
        for state in ("finished", "half-done"):
            for name, edit in EDITS.items():
                key = f"{strategy} {state} {name}"
                output = folder / key.replace(" ", "-")
                shutil.copytree(run.output, output, symlinks=True)
                if state == "half-done":
                    stop_halfway(output)
                before[key], paths[key] = content(output), edited[name][0]
                command = flags(model, edited[name][1], strategy)
                calls[key] = [*command, *edit.flags, "--output_dir", str(output)]
    return first, before, several(calls, folder, paths, ranks=ranks)


REFUSED = [name for name, edit in EDITS.items() if edit.said]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("state", ["finished", "half-done"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_trains_something_else_is_refused_and_loses_nothing(runs, strategy, state, name):
    first, before, seconds = runs
    key = f"{strategy} {state} {name}"
    run: Run = seconds[key]
    assert run.status == 2, run.stdout + run.stderr
    [line] = run.errors
    for words in [f"holds a {state} run of this script (my_task.py) of ", *EDITS[name].said, "--overwrite_output_dir"]:
        assert words in line
    assert content(run.output) == before[key]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_edited_score_needs_no_training(runs, strategy):
    first, _, seconds = runs
    run = seconds[f"{strategy} finished score"]
    assert run.status == 0, run.stderr
    assert "nothing is trained or asked" in run.stdout
    assert "the kept answers are scored again" in run.stdout
    for stage in ("before", "after"):
        assert run.evaluation(stage)["anls"] == pytest.approx(first[strategy].evaluation(stage)["anls"] + 0.25)
        assert (
            run.evaluation(stage)["generated_texts_unique"]
            == first[strategy].evaluation(stage)["generated_texts_unique"]
        )
    assert weights(run.output) == weights(first[strategy].output)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_half_done_run_goes_on_under_an_edited_score(runs, strategy):
    first, _, seconds = runs
    run = seconds[f"{strategy} half-done score"]
    assert run.status == 0, run.stderr
    assert "going on from" in run.stdout
    assert weights(run.output) == weights(first[strategy].output)
    assert run.evaluation("before")["anls"] == pytest.approx(first[strategy].evaluation("before")["anls"] + 0.25)


@pytest.mark.parametrize("state", ["finished", "half-done"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_a_changed_question_is_asked_again(runs, strategy, state):
    first, _, seconds = runs
    run = seconds[f"{strategy} {state} a question to answer"]
    assert run.status == 0, run.stderr
    assert f"before training: 1 of {QUESTIONS} questions are asked, the other answers are kept" in run.stdout
    if state == "finished":
        assert f"after training: 1 of {QUESTIONS} questions are asked" in run.stdout
        assert "nothing is left to train" in run.stdout
    assert weights(run.output) == weights(first[strategy].output)
    for stage in ("before", "after"):
        now, then = run.evaluation(stage), first[strategy].evaluation(stage)
        assert now["ids"] == then["ids"]
        assert [now["generated_texts_unique"][number] for number in (0, 2)] == [
            then["generated_texts_unique"][number] for number in (0, 2)
        ]


def test_the_same_command_again_does_nothing(runs, ranks, tmp_path_factory):
    first, _, _ = runs
    output = tmp_path_factory.mktemp("again") / "full"
    shutil.copytree(first["full"].output, output)
    kept = {name: value for name, value in content(output).items() if name != "report.html"}
    folder = first["full"].output.parent
    command = flags(folder / "model", folder / "first" / "data", "full")
    paths = {"again": folder / "first/my_task.py"}
    run = several({"again": [*command, "--output_dir", str(output)]}, output.parent, paths, ranks=ranks)
    assert run["again"].status == 0, run["again"].stderr
    assert "this run is finished, nothing is trained or asked" in run["again"].stdout
    assert {name: value for name, value in content(output).items() if name != "report.html"} == kept
