"""What it costs that a run can be interrupted: a step and a checkpoint against those of the library's own Trainer.

    python -m benchmarks.checkpoint_cost

One process, LoRA on a tiny model, both trainers in turns; medians. Unit: seconds that passed. Written:
benchmarks/results/checkpoint_cost.json.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

from transformers import Trainer

from demo import build_data, build_model
from finetune_hf_trainer_docvqa import to_conversation
from finetuning.arguments import parse_args
from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.dataset import build_dataset
from finetuning.data.reading import read_splits
from finetuning.training.identity import write_run
from finetuning.training.loading import load_model, load_processor
from finetuning.training.trainer import RecipeTrainer

from .record import RESULTS, provenance, write


def cost(folder: Path, rounds: int = 5, steps: int = 40) -> dict:
    """Medians of both trainers, and their ratio."""
    flags = ["--use_lora", "--max_steps", str(steps), "--save_strategy", "no", "--num_crops", "1", "--no-tqdm"]
    flags += ["--batch_size", "4", "--logging_steps", "1000", "--logging_first_step", "False"]
    paths = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "cost")]
    args = parse_args([*flags, *paths])
    processor = load_processor(args)
    rows, _ = read_splits(folder / "data")
    dataset = build_dataset(rows, to_conversation, processor, args, "train")
    collate = DataCollatorForPhi3V(processor.tokenizer.pad_token_id)
    training, saving = {Trainer: [], RecipeTrainer: []}, {Trainer: [], RecipeTrainer: []}
    for _ in range(rounds):
        for kind in training:
            trainer = kind(
                model=load_model(args),
                args=args,
                train_dataset=dataset,
                data_collator=collate
                if kind is RecipeTrainer
                else lambda features: {key: value for key, value in collate(features).items() if key != "ids"},
                processing_class=processor,
            )
            start = time.perf_counter()
            trainer.train()
            training[kind].append((time.perf_counter() - start) / steps)
            write_run(folder / "cost", {})
            start = time.perf_counter()
            trainer._save_checkpoint(trainer.model_wrapped, None)
            trainer.callback_handler.on_save(args, trainer.state, trainer.control)
            saving[kind].append(time.perf_counter() - start)
            shutil.rmtree(folder / "cost")
    step, checkpoint = (
        {kind.__name__: statistics.median(found[kind]) for kind in found} for found in (training, saving)
    )
    return {
        "seconds_a_step": {name: round(seconds, 5) for name, seconds in step.items()},
        "step_ratio": round(step["RecipeTrainer"] / step["Trainer"], 3),
        "seconds_a_checkpoint": {name: round(seconds, 4) for name, seconds in checkpoint.items()},
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        build_model(Path(temporary) / "model")
        build_data(Path(temporary) / "data", num_train=80, num_test=4)
        result = provenance("torch", "transformers", "accelerate", "peft") | cost(Path(temporary))
    write(RESULTS / "checkpoint_cost.json", result)
    for name in ("seconds_a_step", "step_ratio", "seconds_a_checkpoint"):
        print(name, result[name])


if __name__ == "__main__":
    main()
