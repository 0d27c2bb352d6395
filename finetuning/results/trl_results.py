"""A run of one of TRL's trainers from the first evaluation to the last, and the figures that it leaves."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class EvaluateFirst(TrainerCallback):
    """Evaluates when training begins, unless it goes on from a checkpoint.

    Not before `train`: accelerate takes a model that was evaluated for one that is prepared, and would leave it without
    DistributedDataParallel, so that every rank would train by itself.

    Args:
        trainer: one of TRL's trainers.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.global_step:
            evaluate(self.trainer, "before")


def train_and_evaluate(trainer: Any) -> None:
    """Evaluates, trains, saves and evaluates again.

    Args:
        trainer: one of TRL's trainers, whose configuration says where it writes and which checkpoint it goes on from.
    """
    trainer.add_callback(EvaluateFirst(trainer))
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    evaluate(trainer, "after")
    trainer.save_state()


def evaluate(trainer: Any, stage: str) -> None:
    """Writes eval_<stage>.json: figures by TRL's names, over the rows held back."""
    figures = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / f"eval_{stage}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if name.startswith("reward"))
        print(f"{stage} training: {shown} -> {path}", flush=True)
