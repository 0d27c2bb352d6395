"""The script for one's own data on seven inputs as people have them, without a conversion; and bad inputs, a line each."""

import json
from pathlib import Path

import launch
import own_inputs
import pytest
import recipe
from hub import Hub
from launch import record_bad_inputs, script, several

from benchmarks.record import provenance, write

FLAGS = ["--num_crops", "1", "--no-tqdm", "--batch_size", "6", "--learning_rate", "5e-3", "--warmup_steps", "2", "--max_new_tokens", "12"]  # fmt: skip
TRAINED = [
    *FLAGS,
    "--use_lora",
    "--max_steps",
    "18",
    "--metric",
    "exact_match",
    "rouge_l",
    "--dataloader_num_workers",
    "0",
]
HUB = "hub data set"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return recipe.model_folder(tmp_path_factory.mktemp("own") / "model")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base, request):
    folder = tmp_path_factory.mktemp("runs")
    inputs = {name: make(folder / f"data-{name}") for name, make in own_inputs.INPUTS.items()}
    inputs[HUB] = ["--dataset", own_inputs.HUB_NAME]
    calls = {name: ["--model_name_or_path", str(base), *flags, *TRAINED] for name, flags in inputs.items()}
    with Hub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.put(f"datasets/{own_inputs.HUB_NAME}", own_inputs.hub_files())
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home")}
        usual = launch.environment()
        patch.setattr(launch, "environment", lambda: {**usual, **online})
        found = several(calls, folder, dict.fromkeys(calls, Path(script("own_data"))))
    if path := request.config.getoption("--own-inputs"):
        record(Path(path), inputs, found, str(folder))
    return found


def record(path: Path, inputs: dict[str, list[str]], runs: dict, folder: str) -> None:
    """Writes what each input scored before and after training."""
    rows = {}
    for name, flags in inputs.items():
        stages = {stage: runs[name].evaluation(stage) for stage in ("before", "after")}
        figures = ("exact_match", "rouge_l", "loss", "token_accuracy", "num_answers")
        scores = {stage: {figure: found[figure] for figure in figures} for stage, found in stages.items()}
        rows[name] = {"flags": " ".join(flags).replace(folder, "DIR"), **scores}
    write(path, provenance("torch", "transformers") | {"steps": 18, "inputs": rows})


@pytest.mark.parametrize("name", [*own_inputs.INPUTS, HUB])
def test_an_input_trains_as_it_comes(runs, name):
    run = runs[name]
    assert run.status == 0, run.stdout + run.stderr
    before, after = run.evaluation("before"), run.evaluation("after")
    assert list(after)[:4] == ["exact_match", "rouge_l", "loss", "token_accuracy"]
    assert before["num_answers"] == after["num_answers"] >= 1
    assert after["loss"] < 0.5 * before["loss"]
    assert after["token_accuracy"] > before["token_accuracy"]
    assert after["rouge_l"] > before["rouge_l"]
    assert after["exact_match"] > before["exact_match"]
    card = (run.output / "README.md").read_text()
    names = {HUB: own_inputs.HUB_NAME, "LLaVA json": "llava_pages.json", "csv": "pages.csv"}
    assert names.get(name, f"data-{name}") in card
    assert str(run.output.parent) not in card


def test_the_split_is_the_files_own_or_a_share_that_is_said(runs):
    for name in ("LLaVA json", "csv"):
        assert (
            "no test split: 6 of 24 rows are answered and not trained" in runs[name].stdout
            or "drawn by picture" in runs[name].stdout
        )
    for name in ("native", "ShareGPT jsonl", "messages jsonl", "Parquet with bytes", HUB):
        assert "no test split" not in runs[name].stdout
        assert runs[name].evaluation("after")["num_answers"] == 6


def test_rows_without_an_id_are_called_by_file_and_line(runs):
    assert runs["ShareGPT jsonl"].evaluation("after")["ids"] == [f"val-{line}" for line in range(1, 7)]
    assert runs["Parquet with bytes"].evaluation("after")["ids"][0] == "test-00000-of-00001-1"
    assert runs[HUB].evaluation("after")["ids"] == [f"test-{row}" for row in range(1, 7)]
    # Three lines a row: the question goes over two of them.
    assert all(int(name.removeprefix("pages-")) % 2 == 0 for name in runs["csv"].evaluation("after")["ids"])


@pytest.mark.slow
def test_a_bad_input_is_one_line_and_nothing_is_trained(tmp_path_factory, base, request):
    folder = tmp_path_factory.mktemp("bad-own")
    calls = {
        f"own data: {bad.name}": ["--model_name_or_path", str(base), *FLAGS, *bad.write(folder / f"data-{number}")]
        for number, bad in enumerate(own_inputs.BAD_INPUTS)
    }
    runs = several(calls, folder, dict.fromkeys(calls, Path(script("own_data"))))
    if path := request.config.getoption("--bad-inputs"):
        record_bad_inputs(Path(path), runs, str(folder))
    for bad, run in zip(own_inputs.BAD_INPUTS, runs.values(), strict=True):
        assert run.status == 2, (bad.name, run.stdout + run.stderr)
        [line] = run.errors
        assert bad.expected in line, bad.name
        assert "rows  " not in run.stdout


def test_the_results_that_are_recorded_are_of_all_inputs():
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "own_inputs.json"
    recorded = json.loads(path.read_text())["inputs"]
    assert list(recorded) == [*own_inputs.INPUTS, HUB]


@pytest.mark.slow
def test_two_processes_draw_and_answer_the_same_rows(runs, base, tmp_path):
    flags = ["--model_name_or_path", str(base), *own_inputs.csv_file(tmp_path / "data"), *TRAINED]
    [run] = several({"csv": flags}, tmp_path, {"csv": Path(script("own_data"))}, ranks=2).values()
    assert run.status == 0, run.stdout + run.stderr
    for stage in ("before", "after"):
        found, expected = run.evaluation(stage), runs["csv"].evaluation(stage)
        assert found["ids"] == expected["ids"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5 if stage == "before" else 0.05)
    assert run.stdout.count("no test split") == 1
