"""The best checkpoint on several ranks: each ends with the same weights, those of the best logged loss, or of the best score."""

import json
from pathlib import Path

import pytest
import recipe
import torch
from launch import ROOT, script, several
from safetensors.torch import load_file

STRATEGIES = {
    "full, ZeRO-2": [],
    "full, DDP": ["--deepspeed", "none"],
    "frozen vision": ["--freeze_vision_model"],
    "LoRA": ["--use_lora", "--lora_rank", "4"],
    "QLoRA": ["--use_lora", "--use_qlora", "--lora_rank", "4"],
}
SAVE = "        trainer.save_model()\n"
# What a rank has after training, as a number.
TELL = (
    "        total = sum(p.detach().double().abs().sum() for p in model.parameters() if p.requires_grad)\n"
    '        print(f"rank {args.process_index} ends with {float(total)!r}", flush=True)\n'
)
# A random model's ANLS is 0 at each step; this goes up and down with its answers.
SCORE = '    return {"anls": sum(anls(item.answer, item.references) for item in predictions) / len(predictions)}\n'
RESTLESS = '    return {"anls": sum(map(ord, "".join(item.answer for item in predictions))) % 97 / 97}\n'
# Dies, as by kill -9, in the third evaluation while it trains: after the second checkpoint.
DIES = """
import itertools, os
calls, right = itertools.count(1), RecipeTrainer.evaluation_loop
def dies(*args, **kwargs):
    return os._exit(9) if next(calls) == 3 else right(*args, **kwargs)
RecipeTrainer.evaluation_loop = dies
"""


def task(folder: Path, *changes: tuple[str, str]) -> Path:
    """A copy of the DocVQA script in which each rank tells its weights after training."""
    folder.mkdir(exist_ok=True)
    for package in ("finetuning", "phi3v", "ds_configs"):
        (folder / package).symlink_to(ROOT / package)
    source = Path(script("docvqa")).read_text(encoding="utf-8")
    for old, new in ((SAVE, TELL + SAVE), *changes):
        assert source.count(old) == 1
        source = source.replace(old, new)
    (folder / "my_task.py").write_text(source, encoding="utf-8")
    return folder / "my_task.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("best")
    path = task(folder)
    model, data = recipe.model_folder(folder / "model"), recipe.docvqa_rows(folder / "data", 8, 3)
    flags = [
        *("--model_name_or_path", str(model), "--data_dir", str(data), "--num_crops", "2", "--no-tqdm"),
        *("--batch_size", "4", "--max_steps", "3", "--save_steps", "1", "--save_total_limit", "1"),
        # A rate at which the loss falls and then rises.
        *("--learning_rate", "0.1", "--warmup_steps", "0", "--lr_scheduler_type", "constant", "--max_new_tokens", "2"),
        *("--dataloader_num_workers", "0", "--eval_strategy", "steps", "--eval_steps", "1", "--logging_steps", "1"),
        *("--load_best_model_at_end", "--metric_for_best_model", "eval_loss", "--prediction_loss_only"),
    ]
    calls = {name: [*flags, *more] for name, more in STRATEGIES.items()}
    return several(calls, folder, dict.fromkeys(calls, path), ranks=2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_rank_ends_with_the_best_checkpoint(runs, strategy):
    run = runs[strategy]
    assert run.status == 0, run.stdout + run.stderr
    ends = {line.partition(" ends with ")[2] for line in run.stdout.splitlines() if " ends with " in line}
    assert run.stdout.count(" ends with ") == 2
    assert len(ends) == 1
    losses = run.eval_losses
    best = min(losses, key=losses.get)
    assert best != max(losses), f"the best step is the last one, which proves nothing: {losses}"
    name = "adapter_model" if "LoRA" in strategy else "model"
    final, kept = (
        load_file(folder / f"{name}.safetensors") for folder in (run.output, run.output / f"checkpoint-{best}")
    )
    assert all(torch.equal(tensor, kept[key]) for key, tensor in final.items())


@pytest.fixture(scope="module")
def scored_runs(tmp_path_factory):
    """strategy, or strategy and "killed" or "resumed" -> its run, chosen by the score."""
    folder = tmp_path_factory.mktemp("scored")
    path = task(folder, (SCORE, RESTLESS))
    dying = task(folder / "dying", (SCORE, RESTLESS), ("\n\nif __name__", DIES + "\n\nif __name__"))
    model, data = recipe.model_folder(folder / "model"), recipe.docvqa_rows(folder / "data", 8, 3)
    flags = [
        *("--model_name_or_path", str(model), "--data_dir", str(data), "--num_crops", "2", "--no-tqdm"),
        *("--batch_size", "4", "--max_steps", "12", "--save_steps", "1", "--dataloader_num_workers", "0"),
        *("--learning_rate", "0.02", "--warmup_steps", "0", "--max_new_tokens", "6", "--logging_steps", "1"),
        *("--eval_strategy", "steps", "--eval_steps", "1", "--metric_for_best_model", "anls"),
        *("--load_best_model_at_end", "--early_stopping_patience", "2"),
    ]
    strategies = [strategy for strategy in STRATEGIES if strategy in ("full, ZeRO-2", "LoRA", "QLoRA")]

    def run(name: str, script_path: Path) -> dict:
        where = {strategy: str(folder / f"{name} {strategy}".replace(" ", "-")) for strategy in strategies}
        calls = {
            f"{name} {strategy}": [*flags, *STRATEGIES[strategy], "--output_dir", where[strategy]]
            for strategy in strategies
        }
        return several(calls, folder, dict.fromkeys(calls, script_path), ranks=2)

    straight, killed = run("straight", path), run("killed", dying)
    # the same command, on the same folder
    resumed = run("killed", path)
    return {"straight": straight, "died": killed, "killed": resumed}


@pytest.mark.parametrize("strategy", ["full, ZeRO-2", "LoRA", "QLoRA"])
def test_the_best_score_is_taken_and_the_run_stops_early(scored_runs, strategy):
    found = {}
    for name in ("straight", "killed"):
        run = scored_runs[name][f"{name} {strategy}"]
        assert run.status == 0, run.stdout + run.stderr
        output = Path(run.output.parent / f"{name} {strategy}".replace(" ", "-"))
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        scores = {entry["step"]: entry["eval_anls"] for entry in history if "eval_anls" in entry}
        best = max(scores, key=scores.get)
        # two evaluations in a row without a better one, and no step more
        assert max(scores) < 12
        assert max(scores) == best + 2
        ends = {line.partition(" ends with ")[2] for line in run.stdout.splitlines() if " ends with " in line}
        assert run.stdout.count(" ends with ") == 2
        assert len(ends) == 1
        after = json.loads((output / "eval_after.json").read_text())
        assert after["anls"] == scores[best]
        file = f"{'adapter_model' if 'LoRA' in strategy else 'model'}.safetensors"
        final, kept = load_file(output / file), load_file(output / f"checkpoint-{best}" / file)
        assert all(torch.equal(tensor, kept[key]) for key, tensor in final.items())
        stages = {item["stage"] for item in map(json.loads, (output / "predictions.jsonl").read_text().splitlines())}
        assert stages == {"before", "after", *(f"step {step}" for step in scores)}
        found[name] = scores, ends
    assert scored_runs["died"][f"killed {strategy}"].status == 9
    assert "going on from" in scored_runs["killed"][f"killed {strategy}"].stdout
    assert found["straight"] == found["killed"]
