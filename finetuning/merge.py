"""Merges an adapter into its base model: a whole model, for vLLM and all that takes no adapter.

    python -m finetuning.merge output/docvqa merged
    python -m finetuning.merge output/docvqa/checkpoint-500 merged --dtype bfloat16

The base is the one that adapter_config.json names. Layer by layer, in float32, rounded once to the dtype that is saved. Before
the folder gets its name, the answers and logits of what was saved are held against those of base and adapter. A QLoRA adapter,
trained over a base in 4 bits, is merged into the base itself; the same comparison says what that changes.
"""

import argparse
import gc
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from transformers.utils import logging

from phi3v import Phi3VProcessor

from .arguments import check_model_name
from .command_line import CommandParser
from .environment import prepare_process
from .errors import InputError, RunError, run_script
from .results.answering import precision
from .results.card import write_merged_card
from .results.predictions import PREDICTIONS, read_predictions
from .training.identity import read_run
from .training.loading import open_model, read_adapter, read_model, read_processor, stored_dtype, trained_dtype
from .training.saved import SavedModel, find_saved

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16}
SHARD = "2GB"  # a shard is copied in memory while it is written
DEFAULT_QUESTIONS = ("What is written here?", "What is a receipt?", "Name a colour.")
QUESTIONS = len(DEFAULT_QUESTIONS)
NEW_TOKENS = 8
TIMEOUT = 1800  # seconds
# Shares of the logits' spread by which rounding may move them, in float32 and in 16 bits over all layers.
EXACT, ROUNDED = 1e-3, 0.3


@dataclass
class Said:
    """What a model says to the questions of the comparison: greedy answers' tokens, and the logits that each was taken from."""

    logits: list[torch.Tensor]
    answers: list[list[int]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked as far as that needs no model.

    Raises:
        InputError: for a wrong call.
    """
    parser = CommandParser("merge", __doc__)
    parser.add_argument("adapter", help="output folder or checkpoint-N of a LoRA or QLoRA run")
    parser.add_argument("to", type=Path, help="new folder for the merged model")
    parser.add_argument("--base", help="base model, if it is not where adapter_config.json says")
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged weights (default: the base's own)")
    args = parser.parse_args(argv)
    check_model_name(args.adapter, "ADAPTER")
    if args.to.is_symlink() or (args.to.exists() and (not args.to.is_dir() or any(args.to.iterdir()))):
        raise InputError(f"{args.to}: expected a new folder for the merged model, found something; choose another")
    return args


def merge(saved: SavedModel, dtype: torch.dtype) -> Any:
    """Base and adapter as one model on the CPU, rounded once to `dtype`; at most one layer at a time is held in float32.

    Args:
        saved (SavedModel): an adapter, as `find_saved` gives it.
        dtype (torch.dtype): of the merged weights.
    """
    base = read_model(saved, stored_dtype(saved), "sdpa", False, torch.device("cpu"))
    model: Any = read_adapter(base, saved)
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.float()
        layer.merge(safe_merge=True)
        layer.to(dtype)
    # Not merge_and_unload, which would merge each layer again in its own dtype.
    return model.unload().to(dtype)


def questions_of(saved: SavedModel) -> list[tuple[str, Image.Image | None]]:
    """Questions of the comparison: those of the run, where it has answered some; the first one is about a drawn picture."""
    found = []
    if saved.adapter:
        folders = (saved.adapter, saved.adapter.parent)
        asked = [item.get("question") for folder in folders for item in read_predictions(folder / PREDICTIONS)]
        found = list(
            dict.fromkeys(text for text in asked if isinstance(text, str) and "<|" not in text and text.strip())
        )
    # A gradient: a picture of every brightness. One, since on a CPU its tokens are what takes the time.
    pictures = [Image.linear_gradient("L").convert("RGB"), *[None] * (QUESTIONS - 1)]
    texts = [*found, *DEFAULT_QUESTIONS][:QUESTIONS]
    return list(zip(texts, pictures, strict=True))


@torch.no_grad()
def say(
    model: Any, processor: Phi3VProcessor, questions: list[tuple[str, Image.Image | None]], dtype: torch.dtype
) -> Said:
    """What a model says to questions, one by one.

    Args:
        model: model or PEFT model.
        processor (Phi3VProcessor): its processor; a picture gets one crop, since 17 take minutes on a CPU.
        questions (list): text and picture, or no picture, of each.
        dtype (torch.dtype): what the model computes in.
    """
    said = Said([], [])
    model.eval()
    for text, picture in questions:
        tag = "<|image_1|>\n" if picture else ""
        prompt = processor.apply_chat_template([{"role": "user", "content": tag + text}], add_generation_prompt=True)
        inputs = processor(prompt, [picture] if picture else None, num_crops=1).to(model.device)
        with precision(model, dtype):
            output = model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        said.logits.append(torch.cat(output.logits).float())  # (tokens, V)
        said.answers.append(output.sequences[0, inputs["input_ids"].shape[1] :].tolist())
    return said


def compare(found: Said, expected: Said) -> tuple[float, float, int]:
    """Largest deviation of the logits, their mean (root of squares) as a share of their spread, and how many answers are the same.

    Logits count up to the first token in which two answers differ: what follows answers another text.
    """
    deviations = []
    for number, (a, b) in enumerate(zip(found.logits, expected.logits, strict=True)):
        same_tokens = len(os.path.commonprefix([found.answers[number], expected.answers[number]]))
        deviations.append((a[: same_tokens + 1] - b[: same_tokens + 1]).flatten())
    # Of a hundred thousand logits the largest deviation says little of the others.
    all_deviations = torch.cat(deviations)
    mean, spread = float(all_deviations.square().mean().sqrt()), max(float(logits.std()) for logits in expected.logits)
    same = sum(a == b for a, b in zip(found.answers, expected.answers, strict=True))
    return float(all_deviations.abs().max()), mean / max(spread, 1e-9), same


def check_disk(saved: SavedModel, to: Path) -> None:
    """Compares the free space with what is written: about as much as the base's weights.

    Raises:
        InputError: if it does not fit.
    """
    needed = sum(path.stat().st_size for path in saved.folder.glob("*.safetensors"))
    parent = next(folder for folder in to.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"{to}: expected {needed / 1e9:.1f} GB of free disk space, found {free / 1e9:.1f} GB; choose another disk"
        )


def main() -> None:
    """Merges what the command line says."""
    args = parse_args()
    logging.disable_progress_bar()
    prepare_process(True, None, TIMEOUT, 2**31)
    PartialState(cpu=True)
    saved = find_saved(args.adapter, args.base)
    if not saved.adapter:
        raise InputError(f"{args.adapter}: expected an adapter, found a whole model, which needs no merging")
    check_disk(saved, args.to)
    processor = read_processor(saved)
    stored = stored_dtype(saved)
    dtype = DTYPES[args.dtype] if args.dtype else stored
    questions = questions_of(saved)

    print(f"{args.adapter} into {saved.base}, {str(dtype).removeprefix('torch.')}", flush=True)
    model = merge(saved, dtype)
    # Under its own name only when it is whole and has been compared.
    part = args.to.with_name(f"{args.to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part, max_shard_size=SHARD)
        processor.save_pretrained(part)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise RunError(f"{args.to} could not be written: {error}; nothing is left of it") from None
    del model
    gc.collect()

    # One model at a time.
    expected, bare = say_and_forget(saved, processor, questions, stored, False)
    found, _ = say_and_forget(find_saved(str(part)), processor, questions, dtype, False)
    deviation, share, same = compare(found, expected)
    print(
        f"held against base and adapter on {QUESTIONS} questions: largest logit deviation {deviation:.2g} "
        f"(mean {share:.1%} of their spread), {same} of {QUESTIONS} answers the same",
        flush=True,
    )
    exact = dtype == stored == torch.float32
    # In 16 bits rounding may be as large as what was learnt: then what counts is whose answers these are.
    is_base = compare(found, bare)[1] < share / 2
    if not share < (EXACT if exact else ROUNDED) or is_base:
        raise RunError(
            f"{part}: expected the merged model to say what the adapter says; it is left there, but not used"
        )
    if saved.in_4_bits:
        quantised, _ = say_and_forget(saved, processor, questions, trained_dtype(saved, torch.device("cpu")), True)
        deviation, share, same = compare(found, quantised)
        print(
            f"the adapter was trained over the base in 4 bits; against that: largest logit deviation {deviation:.2g} "
            f"(mean {share:.1%} of their spread), {same} of {QUESTIONS} answers the same",
            flush=True,
        )
    dtype_name = str(dtype).removeprefix("torch.")
    write_merged_card(part, args.to, args.adapter, saved.base, read_run(saved.adapter) or {}, dtype_name)
    if args.to.exists():
        args.to.rmdir()
    os.replace(part, args.to)
    print(f"merged -> {args.to}", flush=True)


def say_and_forget(
    saved: SavedModel, processor: Phi3VProcessor, questions: list, dtype: torch.dtype, in_4_bits: bool
) -> tuple[Said, Said]:
    """What a saved model says, with its adapter and without, in float32 instead of a CPU's float16; its memory is given back."""
    dtype = torch.float32 if dtype == torch.float16 else dtype
    model = open_model(saved, dtype, in_4_bits, torch.device("cpu"))
    said = bare = say(model, processor, questions, dtype)
    if saved.adapter:
        with model.disable_adapter():
            bare = say(model, processor, questions, dtype)
    del model
    gc.collect()
    return said, bare


if __name__ == "__main__":
    run_script(main)
