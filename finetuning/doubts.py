"""Lists the rows whose answers may be wrong: those that a trained model finds least likely against what it would say itself.

    python -m finetuning.doubts output/docvqa --data_dir DIR
    torchrun --nproc_per_node=8 -m finetuning.doubts output/docvqa --data_dir DIR --folds 2 --bf16 --num_train_epochs 2

FOLDER is what `finetuning.ask` takes: a whole model, an adapter, a run's output folder, a checkpoint-N. Written into
--output_dir (default: doubts-NAME beside FOLDER): doubts.html and doubts.jsonl, worst first, each row with its picture, the
given answer, the model's answer and how likely the model finds both; and beside them rows with the same question about the
same picture, or nearly the same, and another answer. The same command goes on where it was stopped, and after some rows were
mended it judges those alone.

With --folds 2 FOLDER itself judges nothing: two LoRA runs begin from the model that FOLDER began from, each without a half of
the rows, and judge the half that they have not seen. Their flags are the script's; they may be given here too.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .arguments import RecipeArguments, check_model_name, parse_args
from .command_line import CommandParser
from .data.dataset import ConversationDataset, build_dataset
from .data.fingerprint import digest
from .data.folds import deal_rows
from .errors import InputError, RunError, Stopped, run_script
from .fold import load_rows
from .results.doubts_page import PAGE, add_twins, write_doubts_page
from .results.judging import DOUBTS, Judge, JudgedPrompts, judge_rows, worst_first, write_doubts
from .score import default_output_dir, flags_as_trained
from .task_script import ROOT, TASKS, load_script
from .training.identity import identify_model, read_run
from .training.loading import load_processor, open_model
from .training.saved import SavedModel, find_saved
from .training.signals import stop_signals

MOST_FOLDS = 10


@dataclass
class DoubtsArguments:
    """What the command line says beside the script's flags; the help texts say what each is."""

    folder: str
    task: str | None
    split: str
    folds: int
    output_dir: str | None


def read_flags(argv: list[str] | None = None) -> tuple[DoubtsArguments, list[str]]:
    """The command's own arguments, checked, and the flags that are the script's."""
    parser = CommandParser("doubts", __doc__, usage="%(prog)s FOLDER --data_dir DIR [flags of the task's script]")
    add = parser.add_argument
    add(
        "folder",
        metavar="FOLDER",
        help="model, adapter, output folder or checkpoint-N; or ORGANISATION/NAME on the hub",
    )
    add(
        "--task",
        help=f"{', '.join(TASKS)}, or the path of a script (default: the one that trained FOLDER)",
    )
    add("--split", default="train", help="split whose rows are judged (default: %(default)s)")
    add(
        "--folds", type=int, default=0, metavar="N", help="judge each of N parts by a model trained without it, 2 to 10"
    )
    add("--output_dir", help="folder to write to (default: doubts-NAME beside FOLDER, with --folds doubts-NAME-folds)")
    args, flags = parser.parse_known_args(argv)
    found = DoubtsArguments(**vars(args))
    if found.folds != 0 and not 2 <= found.folds <= MOST_FOLDS:
        raise InputError(f"--folds {found.folds}: expected 2 to {MOST_FOLDS}")
    check_model_name(found.folder, "FOLDER")
    found.output_dir = found.output_dir or default_output_dir(found.folder, "doubts") + "-folds" * bool(found.folds)
    return found, flags


def main() -> None:
    """Judges what the command line says."""
    own, given = read_flags()
    saved = find_saved(own.folder, fetches=os.environ.get("LOCAL_RANK", "0") == "0")
    task = own.task or _task_of(own.folder, saved)
    script: Any = load_script(task)
    as_trained = flags_as_trained(saved, given)
    if own.folds:
        begin = ["--model_name_or_path", _began_from(saved), "--use_lora", *as_trained, *given]
        train_folds(own, task, begin)
    flags = ["--do_train", "False", "--model_name_or_path", own.folder, *as_trained, *given]
    # Each process judges by itself: nothing is split among them.
    flags += ["--output_dir", str(own.output_dir), "--deepspeed", "none"]
    args = parse_args(flags, kind=_kind_of(script), **_defaults_of(script))
    stop_signals.install()
    processor = load_processor(args)
    rows = load_rows(script.load_splits, args, own.split)
    dataset = build_dataset(rows, script.to_conversation, processor, args, split="eval")
    prompts = JudgedPrompts(dataset, args.data_dir)
    if own.folds:
        judges = _fold_judges(own, args, prompts, dict(deal_rows(rows, script.to_conversation, own.folds)))
    else:
        judges = [_judge(saved, args, dataset, range(len(prompts)))]
    output = Path(args.output_dir)
    begun = time.monotonic()
    doubts = judge_rows(prompts, judges, output / DOUBTS, args)
    if args.process_index:
        return
    add_twins(doubts)
    write_doubts(output / DOUBTS, worst_first(doubts))
    places = [args.data_dir] if isinstance(args.data_dir, str) else args.data_dir or []
    names = places or [item["name"] for item in args.hub_data]
    facts = {
        "rows": f"{len(dataset):,} of {own.split}, {len(prompts):,} answers",
        "data": ", ".join(names),
        "judged by": f"{own.folds} models, each trained without the rows that it judges" if own.folds else own.folder,
    }
    title = f"Doubts about the answers of {', '.join(os.path.basename(os.path.normpath(name)) for name in names)}"
    write_doubts_page(output / PAGE, doubts, dataset, args.report_rows, title, facts, not own.folds)
    others = sum(not item.agrees for item in doubts)
    twins = sum(bool(item.twins) for item in doubts)
    print(f"the model says something else in {others:,} of {len(doubts):,} answers ({time.monotonic() - begun:.0f} s)")
    print(f"same or nearly the same picture, same question, other answer: {twins:,} answers")
    print(f"worst first -> {output / PAGE}, {output / DOUBTS}", flush=True)


def _task_of(folder: str, saved: SavedModel) -> str:
    """Path of the script that trained a model."""
    name = (read_run(saved.adapter or saved.folder) or {}).get("script")
    path = ROOT / os.path.basename(str(name))
    if not name or not path.is_file():
        found = f"{name}, which is not here" if name else "no run.json that names it"
        raise InputError(f"FOLDER {folder}: expected the script that trained it, found {found}; give --task")
    return str(path)


def _kind_of(script: Any) -> type[RecipeArguments]:
    """The script's flags: those of all recipes, or what it adds to them."""
    kinds = [kind for kind in vars(script).values() if isinstance(kind, type) and issubclass(kind, RecipeArguments)]
    return max(kinds, key=lambda kind: len(kind.__mro__), default=RecipeArguments)


def _defaults_of(script: Any) -> dict[str, Any]:
    return {"num_crops": script.NUM_CROPS} if hasattr(script, "NUM_CROPS") else {}


def _began_from(saved: SavedModel) -> str:
    """The model that a run began from; the model itself where no run has trained it."""
    return saved.base if saved.adapter else saved.settings.get("model_name_or_path") or saved.base


def _judge(
    saved: SavedModel, args: RecipeArguments, dataset: ConversationDataset, numbers, part: int | None = None
) -> Judge:
    """A saved model as a judge: opened when it is its turn, known by all that its answers follow from."""
    in_4_bits = args.use_qlora or saved.in_4_bits
    known = [identify_model(str(folder)) for folder in (saved.folder, saved.adapter) if folder]
    crops = dataset.processor.image_processor.num_crops
    by = digest([known, str(args.compute_dtype), in_4_bits, crops, args.max_new_tokens]).hex()
    return Judge(partial(open_model, saved, args.compute_dtype, in_4_bits, args.device), by, numbers, part)


def _fold_judges(own: DoubtsArguments, args, prompts: JudgedPrompts, part_of: dict[str, int]) -> list[Judge]:
    judges = []
    for part in range(own.folds):
        saved = find_saved(str(_fold_folder(own, part)))
        numbers = [number for number, question in enumerate(prompts.questions) if part_of[question.id] == part]
        judges.append(_judge(saved, args, prompts.dataset, numbers, part))
    return judges


def _fold_folder(own: DoubtsArguments, part: int) -> Path:
    return Path(str(own.output_dir)) / f"without-{part + 1}-of-{own.folds}"


def train_folds(own: DoubtsArguments, task: str, flags: list[str]) -> None:
    """Trains the models of --folds, each in processes of its own, as a user would; one that is finished is only looked at.

    The first of this machine's processes starts them, and the others wait; there is no process group yet, which would lose
    patience.

    Raises:
        InputError: on several machines.
        RunError: if a run fails, which has then said why.
        Stopped: by a signal, which the run was sent too.
    """
    ranks, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ranks != local:
        raise InputError(f"--folds on {ranks // local} machines: expected one; FOLDER alone is judged on several")
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = None
    if ranks > 1:
        # That of torchrun.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(days=365))
    key = f"finetuning.doubts/{restart}"
    if os.environ.get("RANK", "0") != "0":
        store.wait([key])  # type: ignore[union-attr]
        return
    stop_signals.install()
    for part in range(own.folds):
        folder = _fold_folder(own, part)
        what = ["-m", "finetuning.fold", "--task", task, "--without", str(part + 1), "--of", str(own.folds)]
        command = [*what, "--split", own.split, *flags, "--output_dir", str(folder)]
        print(f"training without part {part + 1} of {own.folds} -> {folder}", flush=True)
        _run(command, ranks)
    if store:
        store.set(key, "trained")


def _run(command: list[str], processes: int) -> None:
    """Runs a module as `processes` processes of this machine, and hands on signals."""
    # None of what this process's launcher has set.
    begins = ("TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCH_DISABLE_SHARE_RDZV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(begins)}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    child = subprocess.Popen([sys.executable, *launcher, *command], env=environment)
    sent = False
    while child.poll() is None:
        if stop_signals.signum and not sent:
            child.send_signal(stop_signals.signum)
            sent = True
        time.sleep(0.1)
    if stop_signals.signum:
        raise Stopped(stop_signals.signum, "what the run without a part has written is there")
    if child.returncode:
        raise RunError(
            f"the run without a part ended with exit status {child.returncode}, see above; mended, the same command goes on"
        )


if __name__ == "__main__":
    run_script(main)
