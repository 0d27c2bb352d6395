"""The NLVR2, Hateful Memes and UCF-101 scripts end to end, on two processes, in the layouts that their docstrings name."""

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import recipe
import tiny
from launch import ROOT, environment, script, several
from PIL import Image
from sklearn.metrics import roc_auc_score

COLOURS = {"red": (220, 30, 30), "blue": (40, 60, 230)}
FLAGS = [
    *("--batch_size", "4", "--num_train_epochs", "3", "--learning_rate", "2e-3", "--warmup_steps", "0"),
    *("--max_new_tokens", "6", "--dataloader_num_workers", "0", "--logging_steps", "1", "--no-tqdm"),
]
STRATEGIES = {"full": [], "lora": ["--use_lora", "--lora_rank", "4"]}


def nlvr2(folder):
    """Two pictures and one or two statements a row."""
    rows = []
    (folder / "images").mkdir(parents=True)
    for number in range(14):
        names = [f"images/{number}-{side}.png" for side in (0, 1)]
        for name in names:
            tiny.picture(40, 30, seed=number).save(folder / name)
        texts = [{"user": "Are both the same?\nAnswer yes or no.", "assistant": "Yes."}] * (1 + number % 2)
        rows.append({"id": number, "split": "train" if number < 10 else "test", "images": names, "texts": texts})
    recipe.write_jsonl(folder / "rows.jsonl", rows)
    return ["--data_dir", str(folder)], 4, 6


def hateful_memes(folder):
    """The layout of the challenge; its test file has labels here."""
    (folder / "img").mkdir(parents=True)
    for split, numbers in {"train": range(10), "dev": range(10, 16), "test": range(16, 20)}.items():
        rows = []
        for number in numbers:
            name = f"img/{number:05}.png"
            recipe.page("meme").save(folder / name)
            rows.append({"id": number, "img": name, "label": number % 2, "text": 'They said "no".'})
        recipe.write_jsonl(folder / f"{split}.jsonl", rows)
    return ["--data_dir", str(folder), "--eval_split", "test"], 4, 4


def ucf101(folder):
    """Clips of two classes, converted by the converter."""
    videos = folder / "videos"
    for split, count in {"train": 4, "val": 2}.items():
        for number in range(count):
            for name, colour in COLOURS.items():
                path = videos / split / name / f"v_{name}_g{number:02}_c01.avi"
                path.parent.mkdir(parents=True, exist_ok=True)
                with av.open(path, "w") as container:
                    stream = container.add_stream("mpeg4", rate=25)
                    stream.width = stream.height = 32
                    for _ in range(10):
                        picture = np.full((32, 32, 3), colour, np.uint8)
                        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
                    container.mux(stream.encode())
    command = [sys.executable, str(ROOT / "convert_ucf101.py"), "--video_dir", str(videos), "--out_dir"]
    subprocess.run([*command, str(folder / "converted")], check=True, capture_output=True, env=environment())
    return ["--data_dir", str(folder / "converted"), "--num_crops", "1"], 4, 4


TASKS = {build.__name__: build for build in (nlvr2, hateful_memes, ucf101)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(task, strategy) -> its run, and how many rows and answers it should have; all with one import of the libraries."""
    folder = tmp_path_factory.mktemp("tasks")
    base = recipe.model_folder(folder / "model")
    calls, paths, counts = {}, {}, {}
    for task, build in TASKS.items():
        flags, *counts[task] = build(folder / f"{task}-data")
        crops = [] if "--num_crops" in flags else ["--num_crops", "2"]
        for strategy, more in STRATEGIES.items():
            calls[f"{task} {strategy}"] = ["--model_name_or_path", str(base), *flags, *crops, *FLAGS, *more]
            paths[f"{task} {strategy}"] = Path(script(task))
    found = several(calls, folder, paths, ranks=2)
    return {(task, strategy): (found[f"{task} {strategy}"], *counts[task]) for task in TASKS for strategy in STRATEGIES}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", TASKS)
def test_a_task_runs_learns_and_reports(runs, name, strategy):
    run, rows, answers = runs[name, strategy]
    output = run.output
    assert run.status == 0, run.stdout + run.stderr
    assert not run.errors
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    for stage in ("before", "after"):
        found = run.evaluation(stage)
        assert found["num_answers"] == answers
        assert len(set(found["ids"])) == rows
        assert 0 <= found["accuracy"] <= 1
    found = run.evaluation("after")
    right = [
        answer.strip().lower().rstrip(".") in [reference.lower().rstrip(".") for reference in references]
        for answer, references in zip(found["generated_texts_unique"], found["answers_unique"], strict=True)
    ]
    assert found["accuracy"] == pytest.approx(sum(right) / answers)
    assert {"curves.png", "report.html"} <= {path.name for path in output.iterdir()}
    predictions = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    after = [item for item in predictions if item["stage"] == "after"]
    if name == "nlvr2":
        assert [item["turn"] for item in after] == [0, 0, 1, 0, 0, 1]
        first = [ok for ok, item in zip(right, after, strict=True) if item["turn"] == 0]
        assert found["accuracy_first_question"] == pytest.approx(sum(first) / len(first))
    if name == "hateful_memes":
        probabilities = [np.exp(item["choices"]["Yes."]) / np.exp([*item["choices"].values()]).sum() for item in after]
        labels = [item["references"] == ["Yes."] for item in after]
        assert found["auroc"] == pytest.approx(roc_auc_score(labels, probabilities))
    if name == "ucf101":
        assert {key for key in found if key.startswith("accuracy/")} == {"accuracy/red", "accuracy/blue"}
        with Image.open(output / "confusion.png") as confusion:
            assert confusion.width > 100
