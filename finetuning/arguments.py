"""The flags of all recipes: the published names and defaults, over every Hugging Face TrainingArguments flag."""

import argparse
import difflib
import importlib.util
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, get_scheduler
from transformers.hf_argparser import HfArg
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import logging

from phi3v.modeling_phi3_v import SDPA_PACKED

from .environment import (
    MAX_IMAGE_PIXELS,
    batches_ahead,
    check_shared_memory,
    prepare_process,
    runs_on_cpu,
    use_gloo_in_deepspeed,
)
from .errors import InputError
from .lora_fields import read_lora_kwargs

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
ZERO2 = DS_CONFIGS / "zero2.json"
# Of each part of the model; training/parts.py says what they mean.
RATES = ("vision_learning_rate", "projector_learning_rate", "lora_plus_ratio")
PARTS, CHOICES = ("vision", "projector", "language"), ("frozen", "full", "lora")

# --help lists the flags in these groups, as far as the script has them; what is not named here is a flag of TrainingArguments that passes through.
GROUPS = {
    "model": ["model_name_or_path", "attn_implementation", "use_flash_attention", "bf16", "fp16"],
    "strategy": [
        *("freeze_vision_model", "use_lora", "use_qlora", "vision", "projector", "language"),
        *("lora_rank", "lora_alpha_ratio", "lora_dropout", "lora_kwargs", "lora_plus_ratio", "deepspeed"),
    ],
    "data": ["data_dir", "dataset", "columns", "mixture", "num_frames", "eval_share", "full_train", "num_crops", "max_image_pixels", "max_length", "padding_free", "check", "on_bad_row", "max_bad_rows"],
    "optimisation": [
        "batch_size",
        "per_device_train_batch_size",
        "num_train_epochs",
        "learning_rate",
        "vision_learning_rate",
        "projector_learning_rate",
        "weight_decay",
        "warmup_steps",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "recompute",
    ],
    "evaluation": [
        "metric",
        "eval_split",
        "eval_size",
        "per_device_eval_batch_size",
        "max_new_tokens",
        "report_rows",
        "eval_strategy",
        "eval_steps",
        "eval_rows_during_training",
        "metric_for_best_model",
        "load_best_model_at_end",
        "early_stopping_patience",
    ],
    "output": ["output_dir", "do_train", "save_steps", "save_total_limit", "resume_from_checkpoint", "overwrite_output_dir", "on_nonfinite", "disable_tqdm", "push_to_hub", "hub_model_id", "hub_private_repo"],
}  # fmt: skip
OTHER = "Hugging Face TrainingArguments"
# Least and most of each number, None for any.
RANGES = {
    "batch_size": (1, 1_000_000),
    "per_device_train_batch_size": (1, 10_000),
    "per_device_eval_batch_size": (1, 10_000),
    "lora_rank": (1, 3072),  # the width of the language model
    "max_new_tokens": (1, 131_072),  # positions of the model
    "max_length": (1, None),
    "max_image_pixels": (1, None),
    "max_bad_rows": (0, None),
    "eval_size": (0, None),
    "eval_rows_during_training": (1, None),
    "early_stopping_patience": (1, None),
    "report_rows": (0, None),
    "dataloader_num_workers": (0, 256),
    "learning_rate": (0, None),
    "vision_learning_rate": (0, None),
    "projector_learning_rate": (0, None),
    "lora_plus_ratio": (1, None),
    "weight_decay": (0, None),
    "warmup_steps": (0, None),
    "seed": (0, 2**32 - 1),  # numpy's
    "data_seed": (0, 2**32 - 1),
    "label_smoothing_factor": (0, 1),
}
SCRIPT_PREFIX = "finetune_hf_trainer_"


def _flag(default: Any, help: str, **settings: Any) -> Any:
    """A flag; a default of None stands for one that follows from other flags."""
    return HfArg(default=default, help=help, **settings)


def _switch(default: bool | None, help: str, aliases: Sequence[str] = ()) -> Any:
    """A bool flag that is true when given alone, also where its default is None."""
    alone = {"nargs": "?", "const": True} if default is None else {}
    return HfArg(default=default, help=help, aliases=list(aliases), metadata=alone)


@dataclass
class RecipeArguments(TrainingArguments):
    """Arguments of a fine-tuning run; the help texts say what each is and in which unit."""

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "lora_kwargs"]

    model_name_or_path: str = _flag(
        default="microsoft/Phi-3.5-vision-instruct", help="model folder, or name on the Hugging Face hub"
    )
    attn_implementation: str | None = _flag(
        default=None, help="attention kernel: eager, sdpa, flash_attention_2 (default: sdpa)"
    )
    use_flash_attention: bool = _switch(
        False, "flash attention, the best that is installed: flash-attn, or else PyTorch's own kernel (Ampere or newer)"
    )
    bf16: bool = _switch(False, "train in bfloat16 (Ampere or newer, or CPU)")
    fp16: bool = _switch(
        None, "train in float16 with loss scaling; the default on a GPU without --bf16. `--fp16 False`: float32"
    )

    freeze_vision_model: bool = _switch(False, "keep the vision tower and its projector as they are")
    use_lora: bool = _switch(False, "train LoRA adapters instead of the weights")
    use_qlora: bool = _switch(
        False,
        "LoRA over a language model quantised to 4 bits (nf4); the other parts get LoRA too, unless they are named",
    )
    vision: str | None = _flag(
        default=None,
        help="the vision tower: frozen, full or lora (default: as the flags above say, which set all three parts)",
        metadata={"choices": [*CHOICES]},
    )
    projector: str | None = _flag(
        default=None, help="the projector, likewise (default: as above)", metadata={"choices": [*CHOICES]}
    )
    language: str | None = _flag(
        default=None, help="the language model, likewise (default: as above)", metadata={"choices": [*CHOICES]}
    )
    lora_rank: int = _flag(default=64, help="rank of the LoRA matrices")
    lora_alpha_ratio: float = _flag(default=2, help="LoRA alpha divided by the rank")
    lora_dropout: float = _flag(default=0.0, help="dropout before the LoRA matrices, probability 0 to 1")
    lora_kwargs: dict[str, Any] | str | None = _flag(
        default=None, help="more fields of PEFT's LoraConfig as JSON, such as '{\"use_dora\": true}' (docs/parts.md)"
    )
    lora_plus_ratio: float | None = _flag(
        default=None, help="LoRA+: rate of the LoRA matrices B divided by that of A (default: the same rate for both)"
    )
    deepspeed: str | None = _flag(
        default=None,
        help="DeepSpeed: zero2, zero2_offload, zero3 or zero3_offload (ds_configs/), a config file, inline JSON, or none "
        "(default: none with LoRA on any part, else zero2)",
    )

    data_dir: str | None = _flag(default=None, help="folder with your own data instead of the data set on the hub")
    full_train: bool = _switch(False, "train on the whole data set instead of the small split (DocVQA)")
    max_image_pixels: int = _flag(
        default=MAX_IMAGE_PIXELS, help="largest image that is decoded, in pixels: a small file may hold a huge one"
    )
    num_crops: int = _flag(default=16, help="most crops of 336 x 336 pixels an image is cut into, 1 to 16")
    max_length: int | None = _flag(
        default=None,
        help="longest sample allowed, in tokens; a longer one is refused (default: what the model can take)",
    )
    padding_free: bool = _switch(False, "join the samples of a micro-batch in one row instead of padding them")
    check: str = _flag(
        default="all",
        help="rows whose pictures' headers are read and tokens counted before training: all, sample (10,000, evenly spread) or "
        "none; the fields and texts of all rows are",
        metadata={"choices": ["all", "sample", "none"]},
    )
    on_bad_row: str = _flag(
        default="stop",
        help="when a row cannot be used: stop, or skip it (each is named, and listed in bad_rows.jsonl)",
        metadata={"choices": ["stop", "skip"]},
    )
    max_bad_rows: int | None = _flag(
        default=None, help="most rows that --on_bad_row skip leaves out of a split (default: 1%% of them)"
    )

    batch_size: int = _flag(default=16, help="effective batch: samples per optimizer step over all GPUs of all nodes")
    per_device_train_batch_size: int = _flag(
        default=1,
        aliases=["--batch_size_per_gpu", "--batch-size-per-gpu"],
        help="micro-batch: samples at once on each GPU",
    )
    gradient_accumulation_steps: int = _flag(
        default=None,
        help="derived: batch_size / (GPUs x batch_size_per_gpu), rounded up; refused if it is given and differs",
    )
    num_train_epochs: float = _flag(default=1, help="passes over the training data")
    learning_rate: float = _flag(default=4e-5, help="peak learning rate")
    vision_learning_rate: float | None = _flag(
        default=None, help="peak learning rate of the vision tower, adapters included (default: --learning_rate)"
    )
    projector_learning_rate: float | None = _flag(
        default=None, help="peak learning rate of the projector, adapters included (default: --learning_rate)"
    )
    weight_decay: float = _flag(default=0.01, aliases=["--wd"], help="weight decay of AdamW")
    warmup_steps: float = _flag(default=50, help="optimizer steps of linear warm-up; below 1: share of all steps")
    adam_beta1: float = _flag(default=0.9, help="AdamW beta 1")
    adam_beta2: float = _flag(default=0.95, help="AdamW beta 2")
    adam_epsilon: float = _flag(default=1e-7, help="AdamW epsilon")
    max_grad_norm: float = _flag(default=1.0, help="gradients are clipped to this norm")
    recompute: str = _flag(
        default="auto",
        help="layers whose activations are computed again in the backward pass, to save memory: full, vision, none, or auto, the "
        "fewest with which the run fits on the GPU (on a CPU full); "
        "'--activation_checkpointing_kwargs {\"every_n_layers\": 2}' takes every second one",
        metadata={"choices": ["auto", "full", "vision", "none"]},
    )

    eval_split: str | None = _flag(
        default=None, help="split of --data_dir that is answered, such as val or test (default: the task's usual one)"
    )
    eval_size: int | None = _flag(
        default=None,
        help="rows answered before and after training, evenly spread over the split (default: all of it; 0: no evaluation)",
    )
    eval_rows_during_training: int = _flag(
        default=200,
        help="most rows answered at each evaluation of --eval_strategy, evenly spread over those of --eval_size",
    )
    early_stopping_patience: int | None = _flag(
        default=None, help="stop after this many evaluations in a row without a better --metric_for_best_model"
    )
    per_device_eval_batch_size: int = _flag(default=4, help="rows answered at once on each GPU")
    max_new_tokens: int = _flag(default=64, help="longest answer that is generated, in tokens")
    report_rows: int = _flag(
        default=5000, help="most rows that report.html lists, the worst ones; fewer make room for larger pictures"
    )

    output_dir: str = _flag(
        default=None,
        help="folder for weights, checkpoints, predictions and reports (default: output/ and the script's task)",
    )
    do_train: bool = _switch(None, "`--do_train False`: only answer and score, train nothing")
    save_steps: float = _flag(
        default=500, help="optimizer steps between checkpoints (with --save_strategy steps, the default)"
    )
    save_total_limit: int | None = _flag(default=2, help="newest checkpoints that are kept")
    resume_from_checkpoint: str | None = _flag(
        default=None,
        help="go on from this checkpoint folder; given alone or as True: from the newest in output_dir, as a command that is "
        "started again does by itself",
        metadata={"nargs": "?", "const": "True"},
    )
    overwrite_output_dir: bool = _switch(
        False, "start afresh where output_dir holds a run; all that it wrote is removed"
    )
    on_nonfinite: str = _flag(
        default="stop",
        help="when a loss or gradient is not finite: stop, or skip the step (and stop after 10 in a row)",
        metadata={"choices": ["stop", "skip"]},
    )
    disable_tqdm: bool = _switch(False, "no progress bars", aliases=["--no-tqdm", "--no_tqdm"])

    push_to_hub: bool = _switch(
        False, "upload model, card and report to the Hugging Face hub (docs/model-card.md says what goes there)"
    )
    hub_model_id: str | None = _flag(
        default=None, help="OWNER/NAME of the repository on the hub (default: the name of output_dir)"
    )
    hub_private_repo: bool | None = _switch(None, "the repository is private, if --push_to_hub creates it")

    logging_steps: float = _flag(default=10, help="optimizer steps between two logged losses")
    logging_first_step: bool = _switch(True, "log the first step too")
    # Off: costs a GPU synchronisation in each micro-batch.
    logging_nan_inf_filter: bool = _switch(False, "leave nan and inf out of the logged loss")
    # The forward pass decides by itself; this only keeps the Trainer from writing `use_cache: false` into config.json.
    use_cache: bool = _switch(True, "value of use_cache in the saved config.json")
    # The dataset's rows are not columns of tensors, and the model never leaves a trainable parameter unused.
    remove_unused_columns: bool = _switch(False, "leave as it is: features are made by the collator")
    ddp_find_unused_parameters: bool | None = _switch(False, "leave as it is: no parameter goes unused")
    report_to: list[str] = _flag(
        default=None,
        help="experiment trackers, one or several: tensorboard, wandb, mlflow, trackio, ... (default: none)",
    )
    dataloader_num_workers: int = _flag(
        default=None, help="worker processes per GPU that prepare images (default: up to 4, as the cores allow)"
    )

    def __post_init__(self):
        # What was chosen, as the flags are named; `parse_args` fills it.
        self.changed: dict[str, Any] = {}
        # Splits of data sets on the hub; `load_hub` adds them.
        self.hub_data: list[dict[str, Any]] = []
        self._check_values()
        self._check_trackers()
        self.do_train = self.do_train is None or self.do_train
        self._derive_accumulation()
        self._derive_strategy()
        self._check_output_dir()
        if False in (self.activation_checkpointing, self.gradient_checkpointing):
            self.recompute = "none"
        if self.recompute == "auto" and self.use_cpu:
            self.recompute = "full"
        # In bytes; training/fitting.py settles it on a GPU.
        self.planned_peak = 0.0
        self.activation_checkpointing, self.gradient_checkpointing = self.recompute != "none", None
        if self.dataloader_num_workers is None:
            local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            self.dataloader_num_workers = max(0, min(4, len(os.sched_getaffinity(0)) // local_ranks - 1))
        if self.dataloader_prefetch_factor is None and self.dataloader_num_workers:
            self.dataloader_prefetch_factor = batches_ahead(
                self.dataloader_num_workers,
                self.gradient_accumulation_steps,
                self.per_device_train_batch_size,
                self.num_crops,
            )
        self._derive_compilation()
        self._derive_upload()
        try:
            super().__post_init__()
        except (ValueError, TypeError) as error:
            raise InputError(" ".join(str(error).split())) from error
        self._check_optimizer()
        if self.disable_tqdm or self.local_process_index or not sys.stderr.isatty():
            logging.disable_progress_bar()

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the forward and backward pass, and of the weights that are loaded."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    @property
    def strategy(self) -> str:
        """full, LoRA or QLoRA, each maybe with frozen vision; of any other choice what each part is."""
        words = {"lora": "QLoRA" if self.use_qlora else "LoRA"}
        parts = (self.vision, self.projector, self.language)
        if self.language != "frozen" and parts in {(self.language,) * 3, ("frozen", "frozen", self.language)}:
            return words.get(str(self.language), "full") + (" with frozen vision" if self.freeze_vision_model else "")
        others = ", ".join(f"{part} {str(getattr(self, part)).replace('lora', 'LoRA')}" for part in PARTS[:2])
        return f"{others}, language {words.get(str(self.language), self.language)}"

    @property
    def attention(self) -> str:
        """The attention implementation by transformers' name."""
        if self.use_flash_attention and importlib.util.find_spec("flash_attn"):
            return "flash_attention_2"
        name = self.attn_implementation or "sdpa"
        return SDPA_PACKED if self.padding_free and name == "sdpa" else name

    @property
    def shares(self) -> dict[str, float] | None:
        """Name of a source of rows -> share of them in an epoch; without any every row comes once; None for equal shares."""
        return {}

    @property
    def data_paths(self) -> list[str]:
        """Where the rows of --data_dir are: one folder, or the folders and files of a script that takes several."""
        given: Any = self.data_dir
        return [] if given is None else [given] if isinstance(given, str) else list(given)

    @property
    def measures_loss(self) -> bool:
        """Whether loss and token accuracy are measured beside the scores of the answers."""
        return False

    def _check_values(self):
        if not 1 <= self.num_crops <= 16:
            raise InputError(f"--num_crops {self.num_crops}: expected a whole number from 1 to 16")
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise InputError(f"--{name} {value}: expected a number of at least {least}")
            if value is not None and most is not None and value > most:
                raise InputError(f"--{name} {value}: expected at most {most}")
        if self.max_steps != -1 and self.max_steps < 1:
            raise InputError(f"--max_steps {self.max_steps}: expected at least 1; --do_train False trains nothing")
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if name != "deepspeed" and isinstance(value, str) and value.startswith("{"):
                try:
                    json.loads(value)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"--{name} {value:.80}: expected JSON, found: {error}") from None
        evaluates = getattr(self.eval_strategy, "value", self.eval_strategy) != "no"
        for name in ("early_stopping_patience", "metric_for_best_model"):
            if getattr(self, name) is not None and not evaluates:
                raise InputError(
                    f"--{name} {getattr(self, name)}: expected --eval_strategy steps or epoch beside it, whose evaluations it "
                    "goes by, found no"
                )
        if self.early_stopping_patience is not None:
            self.metric_for_best_model = self.metric_for_best_model or "loss"
            # Else a resumed run would begin to count anew.
            self.restore_callback_states_from_checkpoint = True
        if self.do_predict:
            raise InputError(
                "--do_predict: expected it left out; rows are answered before and after training, see --eval_size"
            )
        for name in ("lora_alpha_ratio", "num_train_epochs", "save_steps", "logging_steps", "adam_epsilon"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise InputError(f"--{name} {value}: expected a number over 0")
        for name in ("lora_dropout", "adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise InputError(f"--{name} {value}: expected a number from 0 to below 1")
        if self.use_liger_kernel:
            raise InputError(
                "--use_liger_kernel: expected it left out, it does not know this model; --torch_compile fuses the same operations"
            )
        check_model_name(self.model_name_or_path, "--model_name_or_path")
        self._check_data()

    def _check_data(self):
        if self.data_dir is not None and not os.path.isdir(self.data_dir):
            raise InputError(f"--data_dir {self.data_dir}: no such folder")
        if self.data_dir is not None and self.full_train:
            raise InputError(
                "--full_train with --data_dir: expected one of them; the first is for the data set on the hub"
            )

    def _check_trackers(self):
        """Makes `report_to` a list of trackers, each of which is installed, and logged in where it has to be."""
        given = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        names = [name for words in given for name in words.split(",") if name]
        if names == ["all"]:
            names = get_available_reporting_integrations()
        if names == ["none"]:
            names = []
        for name in names:
            if name not in INTEGRATION_TO_CALLBACK:
                known = ", ".join(["none", "all", *sorted(INTEGRATION_TO_CALLBACK)])
                raise InputError(f"--report_to {name}: expected trackers of {known}; none and all stand alone")
            try:
                # As the Trainer makes it, which would find only after the model is loaded that it cannot.
                INTEGRATION_TO_CALLBACK[name]()
            except Exception as error:  # whatever a tracker raises when it is imported
                missing = name not in get_available_reporting_integrations()
                found = f"that it is not; pip install {name}" if missing else f"one that fails: {_first_line(error)}"
                raise InputError(f"--report_to {name}: expected it installed, found {found}") from error
        if "wandb" in names:
            _check_wandb()
        self.report_to = list(dict.fromkeys(names))

    def _derive_accumulation(self):
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        rounds = -(-self.batch_size // (ranks * self.per_device_train_batch_size))
        if self.gradient_accumulation_steps not in (None, rounds):
            raise InputError(
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps}: expected it left out; "
                f"--batch_size {self.batch_size} on {ranks} GPU(s) with --batch_size_per_gpu {self.per_device_train_batch_size} makes it {rounds}"
            )
        self.gradient_accumulation_steps = rounds

    def _derive_strategy(self):
        # Without the flag, accelerate would not let the ranks of a machine without a GPU know of each other.
        self.use_cpu = runs_on_cpu(self.use_cpu)
        on_gpu = not self.use_cpu
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if on_gpu and local_rank >= torch.cuda.device_count():
            raise InputError(
                f"--nproc_per_node is over the number of GPUs here: expected at most {torch.cuda.device_count()}"
            )
        if self.bf16 and self.fp16:
            raise InputError("--bf16 with --fp16: expected one of them")
        if self.fp16 and not on_gpu:
            raise InputError("--fp16 on the CPU: expected a GPU; on the CPU train in float32 (no flag) or with --bf16")
        if self.fp16 is None:
            self.fp16 = on_gpu and not self.bf16
        if self.bf16 and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise InputError(
                f"--bf16 on {torch.cuda.get_device_name()}: expected Ampere or newer; leave the flag out to train in float16"
            )
        if self.use_qlora and importlib.util.find_spec("bitsandbytes") is None:
            raise InputError(
                "--use_qlora without bitsandbytes: expected it installed; pip install bitsandbytes, or use --use_lora"
            )
        self._derive_parts()
        self._check_attention(on_gpu)
        self._derive_deepspeed()

    def _derive_parts(self):
        """`vision`, `projector` and `language`: as named, else as the published flags say; and those flags by the parts."""
        usual = "lora" if self.use_lora or self.use_qlora else "full"
        chosen = {}
        for part in PARTS:
            frozen = self.freeze_vision_model and part != "language"
            given = getattr(self, part)
            chosen[part] = given or ("frozen" if frozen else usual)
            against = [
                *["--freeze_vision_model"] * (frozen and given not in (None, "frozen")),
                *["--use_qlora"] * (self.use_qlora and part == "language" and given not in (None, "lora")),
                *["--use_lora"] * (self.use_lora and given == "full"),
            ]
            if against:
                others = " ".join(f"--{name} {getattr(self, name) or '...'}" for name in PARTS)
                raise InputError(
                    f"--{part} {given} with {against[0]}: expected flags that agree, found two answers; name the parts alone: {others}"
                )
        if set(chosen.values()) == {"frozen"}:
            raise InputError(
                "--vision, --projector and --language: expected a part that is full or lora, found all frozen; --do_train False "
                "trains nothing"
            )
        self.train_parts(**chosen, in_4_bits=self.use_qlora)
        for name in ("lora_kwargs", "lora_plus_ratio"):
            if getattr(self, name) is not None and not self.use_lora:
                raise InputError(f"--{name} without LoRA: expected --use_lora, or a part that is lora, beside it")
        if self.lora_plus_ratio is not None and "full" in chosen.values():
            raise InputError(
                f"--lora_plus_ratio {self.lora_plus_ratio:g} with a part that is full: expected LoRA alone, since PEFT's groups "
                "would give the biases and norms of that part the rate of the LoRA matrices B"
            )
        if self.lora_kwargs is not None:
            self.lora_kwargs = read_lora_kwargs(self.lora_kwargs, set_by_flags(self), self.use_qlora)
        for part in PARTS[:2]:
            name = f"{part}_learning_rate"
            if getattr(self, name) is not None and getattr(self, part) == "frozen":
                raise InputError(f"--{name} {getattr(self, name)}: expected a {part} that is trained, found it frozen")

    def train_parts(self, vision: str, projector: str, language: str, in_4_bits: bool) -> None:
        """Sets what is trained of each part, and what the published flags then are."""
        self.vision, self.projector, self.language, self.use_qlora = vision, projector, language, in_4_bits
        self.use_lora = "lora" in (vision, projector, language)
        self.freeze_vision_model = vision == projector == "frozen"

    def _derive_deepspeed(self):
        """`deepspeed`, a path or a dict or None, and `deepspeed_config`, its content."""
        self.deepspeed_config: dict[str, Any] | None
        if self.fsdp:
            # Not tested: accelerate does without it on a CPU.
            raise InputError(
                "--fsdp: expected it left out; --deepspeed zero3 splits weights, gradients and optimizer too"
            )
        given = self.deepspeed
        self.deepspeed, self.deepspeed_config = read_deepspeed(given, self.use_lora, self.use_qlora)
        config, what = self.deepspeed_config, given or self.deepspeed
        if config is None:
            return
        derived = {
            "train_micro_batch_size_per_gpu": self.per_device_train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
        }
        for name, value in derived.items():
            if config.get(name, "auto") not in ("auto", value):
                raise InputError(
                    f'--deepspeed {str(what):.80}: {name}: expected "auto" or {value}, which follows from --batch_size '
                    f"{self.batch_size} and --batch_size_per_gpu {self.per_device_train_batch_size}, found {config[name]!r:.40}"
                )
        rates = [f"--{name}" for name in RATES if getattr(self, name) is not None]
        if rates and "optimizer" in config:
            raise InputError(
                f"{rates[0]} with --deepspeed {str(what):.80}: expected a config without an optimizer, whose one rate holds for all "
                "parts, found one; --optim names it"
            )
        if self.use_cpu:
            use_gloo_in_deepspeed()

    def _derive_compilation(self):
        """`compile_options` for the layers, which `load_model` compiles; None without --torch_compile."""
        self.compile_options = None
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            self.compile_options = {
                "backend": self.torch_compile_backend or "inductor",
                "mode": self.torch_compile_mode,
            }
        # The Trainer would compile the whole model: images and packed samples, of other sizes in each step, break it.
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None

    def _derive_upload(self):
        """`upload_to`, where `training/upload.py` sends the model, None without --push_to_hub; it settles `upload_private`."""
        self.upload_to, self.upload_private = None, False
        if self.push_to_hub:
            if not self.do_train:
                raise InputError(
                    "--push_to_hub with --do_train False: expected one of them; nothing new would be uploaded"
                )
            self.upload_to = self.hub_model_id or Path(self.output_dir).resolve().name
        # The Trainer would upload all of the output folder: rows, answers, paths of this machine.
        self.push_to_hub = False

    def _check_optimizer(self):
        """Builds optimizer and schedule once over a single weight, so that wrong settings are found before a model is loaded."""
        weight = torch.nn.Parameter(torch.zeros(1))
        try:
            schedule = {
                "num_warmup_steps": 1,
                "num_training_steps": 2,
                "scheduler_specific_kwargs": self.lr_scheduler_kwargs,
            }
            get_scheduler(self.lr_scheduler_type, torch.optim.SGD([weight], lr=1.0), **schedule)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise InputError(
                f"--lr_scheduler_type {self.lr_scheduler_type.value} with --lr_scheduler_kwargs {self.lr_scheduler_kwargs}: expected "
                f"settings that it takes, found: {_first_line(error)}"
            ) from None
        if self.optim_target_modules:
            # Such an optimizer looks at the model's modules.
            return
        try:
            optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(self)
            given = [setting.split("=")[0].strip() for setting in (self.optim_args or "").split(",") if setting.strip()]
            ignored = [name for name in given if name not in settings]
            if ignored:
                raise ValueError(f"{ignored[0]} is nothing that it takes")
            optimizer([weight], **settings)
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, ImportError) as error:
            given = f" with --optim_args {self.optim_args}: expected name=value,name=value that it takes"
            raise InputError(
                f"--optim {getattr(self.optim, 'value', self.optim)}{given if self.optim_args else ': expected one that is installed'}, "
                f"found: {_first_line(error)}"
            ) from None

    def _check_attention(self, on_gpu: bool):
        known = ("eager", "sdpa", "flash_attention_2")
        if self.attn_implementation not in (None, *known):
            raise InputError(f"--attn_implementation {self.attn_implementation}: expected one of {', '.join(known)}")
        if self.use_flash_attention and self.attn_implementation == "eager":
            raise InputError("--use_flash_attention with --attn_implementation eager: expected one of them")
        if self.attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            raise InputError(
                "--attn_implementation flash_attention_2: expected flash-attn installed; use sdpa, which is PyTorch's own"
            )
        if not (self.use_flash_attention or self.attn_implementation == "flash_attention_2"):
            return
        if not on_gpu:
            raise InputError(
                "flash attention on the CPU: expected a GPU (Ampere or newer); leave the flag out to use sdpa"
            )
        if torch.cuda.get_device_capability()[0] < 8:
            raise InputError(
                f"flash attention on {torch.cuda.get_device_name()}: expected Ampere or newer; leave the flag out to use sdpa"
            )
        if self.compute_dtype == torch.float32:
            raise InputError("flash attention in float32: expected --bf16 or --fp16; leave the flag out to use sdpa")

    def _check_output_dir(self):
        if self.output_dir is None:
            raise InputError("--output_dir: expected a folder")
        output = os.path.realpath(self.output_dir)
        for name, folder in [
            ("model_name_or_path", self.model_name_or_path),
            *(("data_dir", path) for path in self.data_paths),
        ]:
            if os.path.isdir(folder) and os.path.join(output, "").startswith(
                os.path.join(os.path.realpath(folder), "")
            ):
                where = "the same folder" if output == os.path.realpath(folder) else "a folder inside it"
                raise InputError(
                    f"--output_dir {self.output_dir}: expected a folder apart from --{name} {folder}, found {where}"
                )
        try:
            os.makedirs(self.output_dir, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.output_dir):
                pass
        except OSError as error:
            raise InputError(
                f"--output_dir {self.output_dir}: expected a folder to write to, found: {error.strerror}"
            ) from error
        if str(self.resume_from_checkpoint).lower() == "false":
            raise InputError(
                "--resume_from_checkpoint False: expected a folder or True; --overwrite_output_dir starts afresh"
            )
        if str(self.resume_from_checkpoint).lower() == "true":
            self.resume_from_checkpoint = "True"
        elif self.resume_from_checkpoint is not None and not os.path.isdir(self.resume_from_checkpoint):
            raise InputError(f"--resume_from_checkpoint {self.resume_from_checkpoint}: no such folder")
        if self.resume_from_checkpoint is not None and self.overwrite_output_dir:
            raise InputError("--resume_from_checkpoint with --overwrite_output_dir: expected one of them")


def _check_wandb() -> None:
    """Checks that wandb can send what it is given, or need not."""
    import wandb

    if wandb.setup().settings.mode != "online":
        return
    cure = "`wandb login`, or WANDB_API_KEY, or without a connection WANDB_MODE=offline"
    try:
        # One process asks the server whether it takes the key.
        found = wandb.login(prompt=False, verify=os.environ.get("RANK", "0") == "0")
    except wandb.Error as error:
        raise InputError(
            f"--report_to wandb: expected a login that works, found: {_first_line(error)}; {cure}"
        ) from error
    if not found:
        raise InputError(f"--report_to wandb: expected you to be logged in, found no API key; {cure}")


def read_deepspeed(given: str | dict | None, use_lora: bool, use_qlora: bool) -> tuple[Any, dict[str, Any] | None]:
    """What --deepspeed says: the path of a file or an inline config, and the config itself; None and None without DeepSpeed.

    Args:
        given (str | dict, optional): a name of ds_configs/, a path, JSON, or none; None: what the strategy usually takes.
        use_lora (bool): whether adapters are trained, which usually go without DeepSpeed.
        use_qlora (bool): whether over weights in 4 bits.

    Raises:
        InputError: where there is no such file, no JSON object in it, or one that cannot train so.
    """
    named = {path.stem: str(path) for path in sorted(DS_CONFIGS.glob("*.json"))}
    what: Any = given if given is not None else "none" if use_lora else str(ZERO2)
    if isinstance(what, str):
        what = named.get(what, what)
        if what.lower() == "none":
            return None, None
    inline = str(what).lstrip().startswith("{")
    if not inline and not os.path.isfile(what):
        raise InputError(
            f"--deepspeed {what:.80}: expected {', '.join(named)}, a file, inline JSON or none, found no such file"
        )
    try:
        text = what if inline else Path(what).read_text(encoding="utf-8")
        config = text if isinstance(text, dict) else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--deepspeed {str(what):.80}: expected JSON, found: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"--deepspeed {str(what):.80}: expected a JSON object, found {type(config).__name__}")
    zero = config.get("zero_optimization")
    if use_qlora and isinstance(zero, dict) and zero.get("stage") == 3:
        raise InputError(
            f"--use_qlora with --deepspeed {str(given):.80}: expected ZeRO-2 or none, found ZeRO-3, which cannot split 4-bit weights"
        )
    return dict(config) if inline else what, config


class LoraFlags(Protocol):
    """The flags of LoRA alone."""

    lora_rank: int
    lora_alpha_ratio: float
    lora_dropout: float


def set_by_flags(args: LoraFlags) -> dict[str, Any]:
    """Fields of PEFT's LoraConfig that have flags of their own."""
    alpha = float(args.lora_rank * args.lora_alpha_ratio)
    # Kept whole where it is: PEFT writes it into adapter_config.json.
    whole = int(alpha) if alpha.is_integer() else alpha
    return {"r": args.lora_rank, "lora_alpha": whole, "lora_dropout": args.lora_dropout}


def check_model_name(name: str, flag: str) -> None:
    """Checks that there is a folder of a model or an adapter, or that the name may be one on the hub.

    Raises:
        InputError: with the flag, or the file, that holds the name.
    """
    if os.path.isdir(name):
        if not any(os.path.isfile(os.path.join(name, file)) for file in ("config.json", "adapter_config.json")):
            raise InputError(f"{flag} {name}: expected a model folder, found no config.json in it")
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{flag} {name}: no such folder; expected a folder or ORGANISATION/NAME on the hub")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each flag's default to its help, unless there is none or the help says itself what is taken."""

    def _get_help_string(self, action):
        if action.default is None or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """HfArgumentParser with grouped help, and one line instead of a page of usage for a wrong flag."""

    def _add_dataclass_arguments(self, dtype):
        types = get_type_hints(dtype)
        all_fields = {field.name: field for field in fields(dtype) if field.init}
        named = {name for names in GROUPS.values() for name in names}
        for title, names in {**GROUPS, OTHER: [name for name in all_fields if name not in named]}.items():
            group = self.add_argument_group(title)
            for name in (name for name in names if name in all_fields):
                all_fields[name].type = types[name]
                self._parse_dataclass_field(group, all_fields[name])

    def error(self, message):
        raise InputError(f"{message} (--help lists all flags)")

    def parse_flags(self, argv: list[str]) -> argparse.Namespace:
        """Like `parse_args`, but an unknown flag is answered with those that it may mean."""
        namespace, rest = self.parse_known_args(argv)
        unknown = next((word.split("=")[0] for word in rest if word.startswith("--")), rest[0] if rest else None)
        if unknown is None:
            return namespace
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        close = difflib.get_close_matches(unknown, known, n=2)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        self.error(f"unrecognized arguments: {unknown}{meant}")
        return namespace


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), repr(error))


def changed_flags(namespace: argparse.Namespace, kind: Any = RecipeArguments) -> dict[str, Any]:
    """Name of a flag -> its value, of those that differ from the recipes' defaults; the names are the published ones."""
    defaults, found = _Parser(kind, allow_abbrev=False).parse_args([]), {}
    for field in fields(kind):
        if field.init and getattr(namespace, field.name) != getattr(defaults, field.name):
            names = [*field.metadata.get("aliases", []), field.name]
            found[names[0].lstrip("-")] = getattr(namespace, field.name)
    return found


def default_output_dir(script: str) -> str:
    """output/TASK of a script: ./output/docvqa for finetune_hf_trainer_docvqa.py."""
    return os.path.join("output", Path(script).stem.removeprefix(SCRIPT_PREFIX) or "run")


def read_flags(argv: list[str], kind: Any = RecipeArguments) -> Any:
    """The arguments of a command line, such as a run's own in run.json, as far as they say where its rows are.

    Nothing else is checked, and the process is not prepared.

    Raises:
        InputError: for an unknown flag, or data that are not there.
    """
    args = object.__new__(kind)
    vars(args).update(vars(_Parser(kind, allow_abbrev=False).parse_flags(argv)))
    args._check_data()
    return args


def parse_args(argv: list[str] | None = None, kind: Any = RecipeArguments, **defaults) -> RecipeArguments:
    """The arguments of a recipe, checked, and the process prepared for them, before anything expensive starts.

    Args:
        argv (list[str], optional): command line without the program's name.
        kind (type[RecipeArguments]): the script's flags.
        **defaults: a task's own defaults, such as num_crops=4.

    Raises:
        InputError: for an unknown flag, a value out of range or flags that contradict each other.
    """
    usage = "torchrun --nproc_per_node=GPUS %(prog)s [flags]"
    parser = _Parser(kind, allow_abbrev=False, usage=usage, formatter_class=_HelpFormatter)
    parser.set_defaults(**defaults)
    namespace = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    if namespace.output_dir is None:
        namespace.output_dir = default_output_dir(sys.argv[0])
    if namespace.hub_token:
        # As an argument it would be written into training_args.bin.
        os.environ["HF_TOKEN"], namespace.hub_token = namespace.hub_token, None
    prepare_process(
        runs_on_cpu(namespace.use_cpu), namespace.ddp_backend, namespace.ddp_timeout, namespace.max_image_pixels
    )
    args = kind(**vars(namespace))
    args.changed = changed_flags(namespace, kind)
    check_shared_memory(
        args.dataloader_num_workers,
        args.per_device_train_batch_size,
        args.num_crops,
        args.dataloader_prefetch_factor or 2,
    )
    return args
