"""A whole run of the DocVQA script in this process, and what it needs of a hub."""

import sys
from pathlib import Path

from hub import Hub, docvqa, folder_files

import finetune_hf_trainer_docvqa as script

STRATEGIES = {
    "full": ["--deepspeed", "none"],
    "frozen": ["--freeze_vision_model", "--deepspeed", "none"],
    "lora": ["--use_lora", "--lora_rank", "4"],
    "qlora": ["--use_qlora", "--lora_rank", "4"],
}
BASE, PUSHED = "me/tiny", "me/pushed"

SMALL = [
    "--num_crops",
    "1",
    "--batch_size",
    "4",
    "--max_steps",
    "2",
    "--max_new_tokens",
    "8",
    "--no-tqdm",
    "--warmup_steps",
    "0",
]


def run(monkeypatch, model: str | Path, output: Path, *flags: str) -> Path:
    """Two steps on six rows; all rows are answered in eight tokens."""
    given = [
        "--model_name_or_path",
        str(model),
        "--output_dir",
        str(output),
        "--dataloader_num_workers",
        "0",
        *SMALL,
        *flags,
    ]
    monkeypatch.setattr(sys, "argv", ["finetune_hf_trainer_docvqa.py", *given])
    script.main()
    return output


def fill(hub: Hub, model: Path) -> None:
    """A hub with the base model and DocVQA."""
    hub.put(BASE, folder_files(model))
    hub.put("datasets/nielsr/docvqa_1200_examples", docvqa())
