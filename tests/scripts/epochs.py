"""Trains one epoch for each number of rows and batch size that it is given, and counts what the model sees.

    torchrun --nproc_per_node=N epochs.py FOLDER ROWS,... BATCH,... [flags]

FOLDER holds model/ and data/ (tests/recipe.py). Prints a line `RESULT {json}` for each case.
"""

import json
import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from accelerate.utils import gather_object  # noqa: E402
from recipe import arguments  # noqa: E402

from finetune_hf_trainer_docvqa import to_conversation  # noqa: E402
from finetuning.data.collator import DataCollatorForPhi3V  # noqa: E402
from finetuning.data.dataset import build_dataset  # noqa: E402
from finetuning.data.reading import read_splits  # noqa: E402
from finetuning.errors import run_script  # noqa: E402
from finetuning.training.loading import load_model, load_processor  # noqa: E402
from finetuning.training.trainer import RecipeTrainer  # noqa: E402


def train(folder: Path, rows: int, batch: int, flags: list[str]) -> dict:
    output = folder / f"{rows}-{batch}"
    args = arguments(
        folder / "model",
        *("--data_dir", str(folder / "data"), "--output_dir", str(output), "--batch_size", str(batch)),
        *("--save_strategy", "no", "--logging_steps", "1", "--warmup_steps", "0", "--learning_rate", "1e-3"),
        *("--adam_epsilon", "1e-3", "--dataloader_num_workers", "0", *flags),
    )
    processor = load_processor(args)
    train_rows, _ = read_splits(args.data_dir)
    dataset = build_dataset(train_rows[:rows], to_conversation, processor, args, "train")
    model = load_model(args)
    trainer = RecipeTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=DataCollatorForPhi3V(processor.tokenizer.pad_token_id, args.padding_free),
        processing_class=processor,
    )
    seen = []

    def count(_module, _inputs, kwargs):
        if "labels" in kwargs:
            labels, bounds = kwargs["labels"], kwargs.get("cu_seq_lens_q")
            samples = labels if bounds is None else labels[0].split(bounds.diff().tolist())
            seen.append(sum(bool((sample != -100).any()) for sample in samples))

    model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    counts = gather_object([seen])
    return {
        "rows": rows,
        "batch": batch,
        "processes": args.world_size,
        "samples": sum(map(sum, counts)),
        "steps": trainer.state.global_step,
        "losses": losses,
    }


def main(folder: str, rows: str, batches: str, *flags: str) -> None:
    torch.set_num_threads(1)
    for count in map(int, rows.split(",")):
        for batch in map(int, batches.split(",")):
            result = train(Path(folder), count, batch, list(flags))
            if int(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0) == 0:
                print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    # As the scripts: a rank that ends the usual way may abort.
    run_script(partial(main, *sys.argv[1:]))
