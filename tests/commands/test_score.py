"""`python -m finetuning.score`: a saved model answers and is scored as it was at the end of its run."""

import json
from pathlib import Path

import pytest
import recipe
import saved

from finetuning import score

own_process = pytest.fixture(autouse=True)(recipe.own_process)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipe.model_folder(tmp_path_factory.mktemp("score") / "base")


def scored(folder: Path) -> dict:
    return json.loads((folder / "eval_before.json").read_text())


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_a_saved_model_is_scored_on_rows_without_any_to_train_on(kind, base, tmp_path, monkeypatch, capsys):
    data = recipe.docvqa_rows(tmp_path / "data", train=0, test=5)
    folder = base if kind == "whole" else saved.adapter_folder(base, tmp_path / "adapter")
    flags = ["--task", "docvqa", "--data_dir", data, "--no-tqdm", "--max_new_tokens", "6", "--num_crops", "2"]
    saved.call(monkeypatch, score, folder, *flags, "--output_dir", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "nothing is trained" in printed
    assert "without training: anls" in printed
    result = scored(tmp_path / "out")
    assert result["num_answers"] == 5
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert (tmp_path / "out/report.html").exists()


def test_an_adapter_is_scored_with_its_own_weights(base, tmp_path, monkeypatch):
    data = recipe.docvqa_rows(tmp_path / "data", train=0, test=5)
    adapter = saved.adapter_folder(base, tmp_path / "adapter")
    answers = []
    for folder in (base, adapter):
        flags = ["--task", "docvqa", "--data_dir", data, "--no-tqdm", "--max_new_tokens", "6", "--num_crops", "2"]
        saved.call(monkeypatch, score, folder, *flags, "--output_dir", tmp_path / f"score-{folder.name}")
        answers.append(scored(tmp_path / f"score-{folder.name}")["generated_texts_unique"])
    assert answers[0] != answers[1]


def test_flags_follow_from_the_run_and_give_way(base, tmp_path):
    adapter = saved.adapter_folder(base, tmp_path / "adapter")
    settings = {"use_qlora": True, "bf16": True, "fp16": False, "num_crops": 7}
    run = {"script": "s", "started": "", "spread": {}, "rows": {}, "settings": settings}
    (adapter / "run.json").write_text(json.dumps(run))
    flags = score.script_flags(str(adapter), ["--num_crops", "3"])
    assert {"--use_qlora", "--bf16"} <= set(flags)
    assert flags[flags.index("--output_dir") + 1] == str(tmp_path / "score-adapter")
    # the last one counts
    assert [flags[place + 1] for place, flag in enumerate(flags) if flag == "--num_crops"] == ["7", "3"]
    assert "--bf16" not in score.script_flags(str(adapter), ["--fp16", "False"])


def test_training_on_an_adapter_is_refused(base, tmp_path):
    from finetuning.training.loading import load_processor

    adapter = saved.adapter_folder(base, tmp_path / "adapter")
    with pytest.raises(saved.InputError, match="expected a whole model to train on, found an adapter; merge it"):
        load_processor(recipe.arguments(adapter))


def test_a_bad_call_gets_one_line(base, tmp_path, monkeypatch):
    data = recipe.docvqa_rows(tmp_path / "data", train=3, test=0)
    calls = {
        "no task": ([base], "--task"),
        "unknown task": ([base, "--task", "docs"], "--task docs: expected docvqa"),
        "no such folder": ([tmp_path / "gone", "--task", "docvqa"], "no such folder"),
        "flag": ([base, "--task", "docvqa", "--eval_sise", "3"], "did you mean --eval_size"),
        "no rows": ([base, "--task", "docvqa", "--data_dir", data], 'expected rows with "split": "test or val"'),
        "out in model": ([base, "--task", "docvqa", "--output_dir", base / "score"], "found a folder inside it"),
    }
    for name, (argv, says) in calls.items():
        assert says in saved.refusal(monkeypatch, score, *argv), name
