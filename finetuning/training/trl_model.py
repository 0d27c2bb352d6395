"""The model and the adapters that TRL's trainers get."""

from typing import Any, Protocol

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from phi3v import Phi3VConfig

from ..arguments import LoraFlags, set_by_flags
from .loading import read_model
from .lora import target_modules
from .parts import LORA_TARGETS
from .saved import find_saved

# TRL's losses multiply by the head's weight and never call the head: an adapter there would not be trained.
HEAD = "lm_head"


class AdapterArguments(LoraFlags, Protocol):
    """The flags that are read here (see --help)."""

    model_name_or_path: str
    local_process_index: int
    freeze_vision_model: bool


def load_trl_model(args: AdapterArguments, settings: Any) -> PreTrainedModel:
    """The model below the adapters, in the dtype that is computed in, on the process's device.

    Args:
        args (AdapterArguments): the model's name.
        settings: TRL's configuration: bf16, fp16, device.

    Raises:
        InputError: if weights are missing or cannot be read.
    """
    saved = find_saved(args.model_name_or_path, fetches=args.local_process_index == 0)
    dtype = torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else torch.float32
    return read_model(saved, dtype, "sdpa", False, settings.device)


def trl_lora_config(config: Phi3VConfig, args: AdapterArguments) -> LoraConfig:
    """The recipe's adapters but for that of the head; TRL adds them.

    Args:
        config (Phi3VConfig): of the model.
        args (AdapterArguments): rank and the other flags of LoRA.
    """
    parts = ["language"] if args.freeze_vision_model else list(LORA_TARGETS)
    return LoraConfig(
        **set_by_flags(args),
        target_modules=target_modules(config, [name for part in parts for name in LORA_TARGETS[part] if name != HEAD]),
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )
