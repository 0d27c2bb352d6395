"""Scores a model on a task's rows, and trains nothing: a whole model, an adapter, a run's output folder or a checkpoint-N.

    python -m finetuning.score output/docvqa --task docvqa
    torchrun --nproc_per_node=8 -m finetuning.score output/docvqa/checkpoint-500 --task docvqa --data_dir DIR

Runs the task's own script with --do_train False, and so writes what it writes: eval_before.json, predictions.jsonl and
report.html, by default into the folder score-NAME beside the model's. Precision, crops and quantisation are those of the run
that saved the model; all other flags are the script's.
"""

import os
import sys
from pathlib import Path

import torch

from .arguments import check_model_name
from .command_line import CommandParser
from .errors import run_script
from .task_script import TASKS, load_script
from .training.saved import SavedModel, find_saved


def script_flags(folder: str, given: list[str]) -> list[str]:
    """Flags of a task's script that score a saved model as it was trained, followed by those that are given.

    Args:
        folder (str): the saved model.
        given (list[str]): flags of the command line, which count where both say something.
    """
    check_model_name(folder, "FOLDER")
    saved = find_saved(folder, fetches=os.environ.get("LOCAL_RANK", "0") == "0")
    flags = ["--do_train", "False", "--model_name_or_path", folder, "--output_dir", default_output_dir(folder)]
    return [*flags, *flags_as_trained(saved, given), *given]


def flags_as_trained(saved: SavedModel, given: list[str]) -> list[str]:
    """Flags for the crops, quantisation and precision that a model was trained with; no precision where `given` holds one."""
    flags = []
    num_crops = saved.settings.get("num_crops") or saved.num_crops
    if num_crops:
        flags += ["--num_crops", str(num_crops)]
    if saved.in_4_bits:
        flags += ["--use_qlora"]
    if saved.settings and not {"--bf16", "--fp16"} & {flag.split("=")[0] for flag in given}:
        if saved.settings.get("bf16"):
            flags += ["--bf16"]
        elif not saved.settings.get("fp16") and torch.cuda.is_available():
            flags += ["--fp16", "False"]
    return flags


def default_output_dir(folder: str, command: str = "score") -> str:
    """COMMAND-NAME beside a folder; under output/ for a model on the hub."""
    path = Path(os.path.normpath(folder))
    return str((path.parent if path.is_dir() else Path("output")) / f"{command}-{path.name}")


def main() -> None:
    """Scores what the command line says."""
    parser = CommandParser("score", __doc__, usage="%(prog)s FOLDER --task TASK [flags of the task's script]")
    parser.add_argument("folder", help="model, adapter, output folder or checkpoint-N; or ORGANISATION/NAME on the hub")
    parser.add_argument("--task", required=True, help=f"{', '.join(TASKS)}, or the path of a script of your own")
    args, flags = parser.parse_known_args()
    script = load_script(args.task)
    sys.argv = [str(script.__file__), *script_flags(args.folder, flags)]
    script.main()


if __name__ == "__main__":
    run_script(main)
