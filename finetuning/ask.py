"""Asks a model: a whole one, an adapter, a run's output folder or a checkpoint-N.

    python -m finetuning.ask output/docvqa --image page.png "What is the total?"
    python -m finetuning.ask output/docvqa                            # a chat; /help says what it takes
    python -m finetuning.ask output/docvqa --data scans/ --out answers.jsonl "What is the total?"
    torchrun --nproc_per_node=8 -m finetuning.ask output/docvqa --data 'scans/*.png' --out answers.jsonl "What is the total?"

With --data, each picture of a folder or pattern is asked about by itself; a jsonl file with rows {"id", "image" or "images",
"question"} holds its own questions. Every answer is written as it comes, and the same command goes on where it was stopped.
Answers are greedy, in the precision and with the crops that the model was trained with.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.utils import logging

from .arguments import check_model_name
from .command_line import CommandParser
from .data.dataset import build_dataset
from .data.fingerprint import digest
from .data.images import image_size
from .environment import MAX_IMAGE_PIXELS, check_shared_memory, prepare_process, runs_on_cpu
from .errors import InputError, run_script
from .results.chat import Chat, Reply, TerminalStreamer
from .results.unlabelled import answer_unlabelled, find_rows, to_conversation
from .training.identity import identify_model
from .training.loading import open_model, read_processor, trained_dtype
from .training.saved import SavedModel, find_saved
from .training.signals import stop_signals

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TIMEOUT = 1800  # seconds
CHAT_HELP = """\
/image PATH   shows a picture with the next question; several are allowed
/new          begins a new conversation
/quit         ends the chat (or Ctrl-D)"""


@dataclass
class AskArguments:
    """What the command line says, with the fields of `data.dataset.DataArguments`; the help texts say what each is."""

    folder: str
    question: str | None
    image: list[str]
    data: str | None
    out: Path | None
    base: str | None
    quantize: str | None
    dtype: str | None
    num_crops: int | None
    max_new_tokens: int
    batch_size: int
    on_bad_row: str
    max_bad_rows: int | None
    max_image_pixels: int
    max_length: int | None = None
    data_dir: str | None = None
    eval_size: int | None = None
    seed: int = 0
    do_train: bool = False


def parse_args(argv: list[str] | None = None) -> AskArguments:
    """The arguments, checked as far as that needs no model.

    Raises:
        InputError: for a wrong call.
    """
    parser = CommandParser("ask", __doc__)
    add = parser.add_argument
    add("folder", help="model, adapter, output folder or checkpoint-N; or ORGANISATION/NAME on the hub")
    add("question", nargs="?", help="left out: a chat in the terminal")
    add("--image", action="append", default=[], metavar="PATH", help="a picture to ask about; again for several")
    add("--data", metavar="DIR|PATTERN|JSONL", help="pictures to ask about one by one, or rows with questions")
    add("--out", type=Path, metavar="JSONL", help="file for the answers to --data")
    add("--base", help="base model of an adapter, if it is not where adapter_config.json says")
    add("--quantize", choices=("none", "nf4"), help="weights in 4 bits (default: as trained)")
    add("--dtype", choices=DTYPES, help="precision (default: as trained, or as the weights are)")
    add("--num_crops", type=int, help="most crops of an image, 1 to 16 (default: as trained)")
    add("--max_new_tokens", type=int, default=256, help="longest answer, in tokens (default: %(default)s)")
    add("--batch_size", type=int, default=4, help="rows of --data at once on each GPU (default: %(default)s)")
    add("--on_bad_row", choices=("stop", "skip"), default="stop", help="a picture of --data that cannot be read")
    add("--max_bad_rows", type=int, help="most pictures that are skipped (default: 1%%)")
    add("--max_image_pixels", type=int, default=MAX_IMAGE_PIXELS, help="largest picture, in pixels")
    # Not parse_args, which would not take a question after --image.
    args = AskArguments(**vars(parser.parse_intermixed_args(sys.argv[1:] if argv is None else argv)))
    for name, least, most in (
        *(("num_crops", 1, 16), ("max_new_tokens", 1, 131_072), ("batch_size", 1, 10_000)),
        *(("max_image_pixels", 1, None), ("max_bad_rows", 0, None)),
    ):
        value = getattr(args, name)
        if value is not None and (value < least or (most and value > most)):
            raise InputError(f"--{name} {value}: expected {f'{least} to {most}' if most else f'at least {least}'}")
    check_model_name(args.folder, "FOLDER")
    if (args.data is None) != (args.out is None):
        given, missing = ("--data", "--out answers.jsonl") if args.data else ("--out", "--data")
        raise InputError(f"{given}: expected {missing} beside it, found none")
    if args.data and args.image:
        raise InputError("--image with --data: expected one of them")
    if args.question is not None and not args.question.strip():
        raise InputError("question: expected text, found a blank one")
    return args


def main() -> None:
    """Answers what the command line says."""
    args = parse_args()
    logging.disable_progress_bar()
    on_cpu = runs_on_cpu()
    prepare_process(on_cpu, None, TIMEOUT, args.max_image_pixels)
    state = PartialState(cpu=on_cpu)
    rows = find_rows(args.data, args.question) if args.data else None
    saved = find_saved(args.folder, args.base, fetches=state.is_local_main_process)
    processor = read_processor(saved, args.num_crops)
    if rows is not None:
        answer_rows(args, saved, processor, rows, state)
        return
    if state.num_processes > 1:
        raise InputError(f"{state.num_processes} processes: expected one to ask or chat; --data takes several")
    if args.question is None and not sys.stdin.isatty() and args.image:
        raise InputError("--image without a question: expected one, found none")
    dtype, in_4_bits = how_to_load(args, saved, state.device)
    model = open_model(saved, dtype, in_4_bits, state.device)
    chat = Chat(model, processor, dtype, args.max_new_tokens)
    if args.question is not None:
        say(chat.ask(args.question, args.image, TerminalStreamer(processor.tokenizer)))
    else:
        talk(chat, args.image)


def how_to_load(args: AskArguments, saved: SavedModel, device: torch.device) -> tuple[torch.dtype, bool]:
    """Dtype, and whether the language model is quantised to 4 bits: as asked, or else as trained."""
    dtype = DTYPES[args.dtype] if args.dtype else trained_dtype(saved, device)
    return dtype, args.quantize == "nf4" or (args.quantize is None and saved.in_4_bits)


def answer_rows(args: AskArguments, saved: SavedModel, processor, rows: Sequence, state: PartialState) -> None:
    """Answers the rows of --data into --out."""
    assert args.out is not None, "parse_args asks for it"
    workers = max(0, min(4, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
    check_shared_memory(workers, args.batch_size, processor.image_processor.num_crops)
    dataset = build_dataset(rows, to_conversation, processor, args, split="eval")
    dtype, in_4_bits = how_to_load(args, saved, state.device)
    # All that an answer follows from, beside what is asked.
    known = [identify_model(str(folder)) for folder in (saved.folder, saved.adapter) if folder]
    crops = processor.image_processor.num_crops
    by = digest([known, str(dtype), in_4_bits, crops, args.max_new_tokens]).hex()
    model = open_model(saved, dtype, in_4_bits, state.device)
    stop_signals.install()
    kept = answer_unlabelled(model, dataset, args.out, by, dtype, args.max_new_tokens, args.batch_size, workers)
    if state.is_main_process:
        bad = f", {len(dataset.bad_rows)} skipped" if dataset.bad_rows else ""
        print(f"{len(dataset)} answers ({kept} were there{bad}) -> {args.out}", flush=True)


def talk(chat: Chat, images: list[str]) -> None:
    """A chat on the terminal, or with the lines of stdin."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        with suppress(ImportError):
            import readline  # noqa: F401, the keys of a terminal
        print(CHAT_HELP)
    shown = list(images)
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/new":
            chat.turns, shown = [], []
        elif command == "/image" and rest.strip():
            path = os.path.expanduser(rest.strip().strip("'\""))
            try:
                image_size(path)
                shown.append(path)
            except InputError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
        elif command.startswith("/"):
            print(CHAT_HELP)
        elif line:
            try:
                say(chat.ask(line, shown, TerminalStreamer(chat.processor.tokenizer)))
            except InputError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                print("\n(cut short)", file=sys.stderr, flush=True)
            shown = []


def say(reply: Reply) -> None:
    """What an answer took; the answer itself is on stdout already."""
    if not reply.text:
        print("(an empty answer)", file=sys.stderr)
    print(reply.speed, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_script(main)
