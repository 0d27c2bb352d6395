"""Trains a task's script without a part of its rows, so that the part can be judged; `finetuning.doubts --folds` starts it.

    torchrun --nproc_per_node=8 -m finetuning.fold --task docvqa --without 1 --of 2 --use_lora --output_dir output/without-1

Parts count from 1. All other flags are the script's; nothing is answered before or after training.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from .arguments import RecipeArguments
from .command_line import CommandParser
from .data.folds import deal_rows
from .data.reading import select
from .errors import InputError, run_script
from .task_script import load_script


def load_rows(load_splits: Callable[[RecipeArguments], tuple], args: RecipeArguments, split: str) -> Sequence:
    """The rows of one split.

    Args:
        load_splits (Callable): the script's own.
        args (RecipeArguments): as for training.
        split (str): its name in --data_dir; of data on the hub "train", or anything else for the rows to answer.
    """
    of_hub, as_given = args.data_dir is None, (args.do_train, args.eval_split)
    # A folder may hold that split alone.
    args.do_train, args.eval_split = of_hub and split == "train", split
    train, evaluation = load_splits(args)
    args.do_train, args.eval_split = as_given
    return train if of_hub and split == "train" else evaluation


def main() -> None:
    """Trains what the command line says."""
    usage = "%(prog)s --task TASK --without N --of PARTS [flags of the task's script]"
    parser = CommandParser("fold", __doc__, usage=usage)
    parser.add_argument("--task", required=True, help="as of finetuning.doubts")
    parser.add_argument("--without", type=int, required=True, help="the part that is left out, from 1")
    parser.add_argument("--of", type=int, required=True, help="parts that the rows are dealt into, at least 2")
    parser.add_argument("--split", default="train", help="split whose rows these are (default: train)")
    args, flags = parser.parse_known_args()
    if args.of < 2 or not 1 <= args.without <= args.of:
        raise InputError(f"--without {args.without} --of {args.of}: expected one of at least 2 parts")
    script: Any = load_script(args.task)
    load_splits = script.load_splits

    def load_others(recipe: RecipeArguments):
        rows = load_rows(load_splits, recipe, args.split)
        parts = deal_rows(rows, script.to_conversation, args.of)
        return select(rows, [number for number, (_, part) in enumerate(parts) if part != args.without - 1]), []

    script.load_splits = load_others
    # The last one counts.
    sys.argv = [str(script.__file__), *flags, "--eval_size", "0"]
    script.main()


if __name__ == "__main__":
    run_script(main)
