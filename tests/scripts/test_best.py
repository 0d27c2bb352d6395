"""The best checkpoint on several ranks: each ends with the same weights, those of the best logged loss."""

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
SAVE = "    trainer.save_model()\n"
# What a rank has after training, as a number.
TELL = (
    "    total = sum(p.detach().double().abs().sum() for p in model.parameters() if p.requires_grad)\n"
    '    print(f"rank {args.process_index} ends with {float(total)!r}", flush=True)\n'
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("best")
    for package in ("finetuning", "phi3v", "ds_configs"):
        (folder / package).symlink_to(ROOT / package)
    source = Path(script("docvqa")).read_text(encoding="utf-8")
    assert source.count(SAVE) == 1
    (folder / "my_task.py").write_text(source.replace(SAVE, TELL + SAVE), encoding="utf-8")
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
    return several(calls, folder, dict.fromkeys(calls, folder / "my_task.py"), ranks=2)


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
