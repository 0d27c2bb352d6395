"""The flags of the scripts that train with TRL: TRL's own, and the recipe's for model, data and LoRA under the same names."""

import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.trainer_utils import get_last_checkpoint

from .arguments import check_model_name
from .environment import MAX_IMAGE_PIXELS, prepare_process, runs_on_cpu
from .errors import InputError
from .task_script import OWN_DATA
from .training.saved import ADAPTER_CONFIG

TIMEOUT = 1800  # of a collective operation, in seconds; TrainingArguments' default


@dataclass
class TrlArguments:
    """What TRL's configurations do not hold; adapters are all that is trained, so that the model below is the reference."""

    model_name_or_path: str = field(
        default="microsoft/Phi-3.5-vision-instruct", metadata={"help": "model folder, or name on the Hugging Face hub"}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "folder with your own data instead of the data set on the hub"}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "split of --data_dir that is held back, such as val or test"}
    )
    eval_size: int | None = field(
        default=None, metadata={"help": "rows held back that are evaluated, evenly spread (default: all)"}
    )
    num_crops: int = field(
        default=16, metadata={"help": "most crops of 336 x 336 pixels an image is cut into, 1 to 16"}
    )
    on_bad_row: str = field(
        default="stop", metadata={"help": "when a row cannot be used: stop, or skip it", "choices": ["stop", "skip"]}
    )
    max_bad_rows: int | None = field(
        default=None, metadata={"help": "most rows that --on_bad_row skip leaves out of a split (default: 1%% of them)"}
    )
    freeze_vision_model: bool = field(
        default=False, metadata={"help": "no adapters on the vision tower and its projector"}
    )
    lora_rank: int = field(default=64, metadata={"help": "rank of the LoRA matrices"})
    lora_alpha_ratio: float = field(default=2, metadata={"help": "LoRA alpha divided by the rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the LoRA matrices, probability 0 to 1"})

    def __post_init__(self):
        # What the rows' checks and `load_splits` read besides; `parse_trl_args` settles what follows from TRL's own flags.
        self.do_train, self.max_length, self.seed, self.device = True, None, 0, torch.device("cpu")
        self.local_process_index = int(os.environ.get("LOCAL_RANK", 0))
        self.hub_data: list[dict[str, Any]] = []
        self.upload_to, self.use_lora = None, True
        check_model_name(self.model_name_or_path, "--model_name_or_path")
        if self.data_dir is not None and not os.path.isdir(self.data_dir):
            raise InputError(f"--data_dir {self.data_dir}: no such folder")
        for name, least, most in (("num_crops", 1, 16), ("lora_rank", 1, 3072), ("eval_size", 1, None)):
            value = getattr(self, name)
            if value is not None and (value < least or (most and value > most)):
                up_to = f" to {most}" if most else " on"
                raise InputError(f"--{name} {value}: expected a whole number from {least}{up_to}")
        if not self.lora_alpha_ratio > 0:
            raise InputError(f"--lora_alpha_ratio {self.lora_alpha_ratio}: expected a number over 0")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora_dropout {self.lora_dropout}: expected a number from 0 to below 1")


Arguments = TypeVar("Arguments", bound=TrlArguments)


@dataclass
class TaskArguments(TrlArguments):
    """The same where rows and score are a task script's."""

    task: str = field(
        default="docvqa", metadata={"help": "whose rows and score are taken: a task's name, or the path of a script"}
    )
    full_train: bool = field(
        default=False, metadata={"help": "the whole data set on the hub instead of its small split (DocVQA)"}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.task == OWN_DATA:
            raise InputError(
                f"--task {OWN_DATA}: expected a task with a score of its own, found the one that takes any rows; copy a script "
                "and give its path (docs/a-new-task.md)"
            )


def import_trl() -> Any:
    """The package `trl`, which only these scripts need.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import trl
    except ImportError:
        raise InputError("TRL: expected it installed, found none; pip install -r requirements-trl.txt") from None
    return trl


def parse_trl_args(config: str, kind: type[Arguments], argv: list[str] | None = None) -> tuple[Arguments, Any]:
    """Our arguments and TRL's, checked, and the process prepared for them, before anything expensive starts.

    Args:
        config (str): name of TRL's configuration, such as "DPOConfig".
        kind (type): `TrlArguments`, or `TaskArguments`.
        argv (list[str], optional): command line without the program's name; `--config FILE` is TRL's own.

    Raises:
        InputError: if TRL is not installed; for an unknown flag, a value out of range or flags that contradict each other.
    """
    trl, argv = import_trl(), sys.argv[1:] if argv is None else argv
    # TRL still says `gradient_checkpointing`, which transformers remarks upon at every evaluation.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
    parser = trl.TrlParser((kind, getattr(trl, config)), allow_abbrev=False)
    on_cpu = runs_on_cpu("--use_cpu" in argv)
    # max_length and the columns are none of TRL's business here: rows are encoded, and their lengths checked, as in the recipes.
    parser.set_defaults(
        output_dir=os.path.join("output", Path(sys.argv[0]).stem.removeprefix("finetune_")),
        use_cpu=on_cpu,
        max_length=None,
        remove_unused_columns=False,
        # The Trainer's default of all that are installed.
        report_to="none",
    )

    def error(message: str) -> None:
        raise InputError(f"{message} (--help lists all flags)")

    parser.error = error
    prepare_process(on_cpu, None, TIMEOUT, MAX_IMAGE_PIXELS)
    try:
        # GRPOConfig has no max_length: the default stands by itself then.
        args, settings, *_ = parser.parse_args_and_config(argv)
    except (ValueError, TypeError, OSError) as error_found:
        raise InputError(" ".join(str(error_found).split())) from error_found
    args.seed, args.device = settings.seed, settings.device
    args.max_length = getattr(settings, "max_length", None)
    settings.resume_from_checkpoint = _checkpoint(settings.resume_from_checkpoint, settings.output_dir)
    _check_groups(settings)
    return args, settings


def _check_groups(settings: Any) -> None:
    """Checks that all answers to a question are evaluated together (GRPO); TRL itself would find out at the first evaluation."""
    group = getattr(settings, "num_generations_eval", None) or getattr(settings, "num_generations", 1)
    if settings.per_device_eval_batch_size * settings.world_size % group:
        raise InputError(
            f"--per_device_eval_batch_size {settings.per_device_eval_batch_size} on {settings.world_size} process(es): expected a "
            f"multiple of {group} answers, which each question gets (--num_generations)"
        )


def _checkpoint(given: str | None, output_dir: str) -> str | None:
    """Folder of the checkpoint to go on from; True stands for the newest in the output folder."""
    if given is None:
        if any(Path(output_dir).glob("checkpoint-*")) or (Path(output_dir) / ADAPTER_CONFIG).exists():
            raise InputError(
                f"--output_dir {output_dir}: expected a folder without a run, found one; --resume_from_checkpoint True goes on with "
                "it, or choose another"
            )
        return None
    if given.lower() != "true":
        if not os.path.isdir(given):
            raise InputError(f"--resume_from_checkpoint {given}: no such folder")
        return given
    newest = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if newest is None:
        raise InputError(
            f"--resume_from_checkpoint {given}: expected a checkpoint-N in {output_dir}, found none; leave the flag out to begin"
        )
    return newest
