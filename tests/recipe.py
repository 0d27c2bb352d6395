"""What the tests of the recipe share: a tiny model folder, pages in the DocVQA layout, arguments that leave no trace."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image, ImageDraw
from transformers.integrations import unset_hf_deepspeed_config

from finetuning.arguments import RecipeArguments, parse_args
from finetuning.training.signals import stop_signals

ROOT = Path(__file__).parents[1]
# What torchrun sets, and what the arguments set in its place for one process.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")


def own_process(tmp_path, monkeypatch):
    """Body of a fixture: what a test sets up for a run (ranks, environment) is gone in the next."""
    monkeypatch.chdir(tmp_path)  # for --output_dir output
    saved, threads = dict(os.environ), torch.get_num_threads()
    # A second one only waits for the first in so small a model, and for other people's processes.
    torch.set_num_threads(1)
    for name in LAUNCHER:
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(saved)
    torch.set_num_threads(threads)
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
    unset_hf_deepspeed_config()
    stop_signals.__init__()
    transformers.logging.enable_progress_bar()


def model_folder(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A model folder with tiny.py's model and processor."""
    tiny.model(**changes).to(dtype).save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


def arguments(folder: Path, *flags: str, kind: type[RecipeArguments] = RecipeArguments) -> RecipeArguments:
    """Arguments for the model in `folder`, with few crops and no progress bars; the output folder is output/."""
    given = ["--model_name_or_path", str(folder), "--num_crops", "2", "--no-tqdm", "--output_dir", "output"]
    return parse_args([*given, *flags], kind=kind)


def on_ranks(monkeypatch, module: str, count: int, function: Callable[[int], Any]) -> list:
    """What `function(rank)` returns or raises on each of `count` ranks, which are threads of this process.

    In `module`, PartialState and gather_object are replaced by ones that know the thread's rank.
    """
    here, barrier, sent, outcomes = threading.local(), threading.Barrier(count, timeout=60), {}, [None] * count

    def state(*_, **__):
        return SimpleNamespace(
            process_index=here.rank,
            num_processes=count,
            is_main_process=here.rank == 0,
            wait_for_everyone=barrier.wait,
        )

    def gather(found: list) -> list:
        sent[here.rank] = found
        barrier.wait()
        together = [item for rank in range(count) for item in sent[rank]]
        barrier.wait()
        return together

    def run(rank: int):
        here.rank = rank
        try:
            outcomes[rank] = function(rank)
        except Exception as error:
            outcomes[rank] = error

    with monkeypatch.context() as patched:
        patched.setattr(f"{module}.PartialState", state)
        patched.setattr(f"{module}.gather_object", gather)
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return outcomes


def page(text: str, size: tuple[int, int] = (60, 40)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((8, 8), text, fill="black")
    return image


def docvqa_rows(folder: Path, train: int = 10, test: int = 5) -> Path:
    """Pages in the DocVQA layout: rows.jsonl with a field split, images/; some rows have several acceptable answers."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(train + test):
        name = f"images/{number}.png"
        # portrait and landscape, of one and of two crops
        page(str(number), [(60, 40), (28, 60), (30, 30)][number % 3]).save(folder / name)
        answers = [str(number), f"no. {number}", f"{number}."] if number % 2 else [f"page {number}"]
        split = "train" if number < train else "test"
        question = {"en": ["Which page is it?", "What is the number on this page?"][number % 2]}
        rows.append({"id": f"page-{number}", "split": split, "image": name, "query": question, "answers": answers})
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
