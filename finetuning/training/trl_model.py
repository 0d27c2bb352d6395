"""The model and the adapters that TRL's trainers get."""

import re
from typing import Any, Protocol

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from phi3v import Phi3VConfig

from .loading import read_model
from .lora import LANGUAGE_TARGETS, VISION_TARGETS
from .saved import find_saved

# TRL's losses multiply by the head's weight and never call the head: an adapter there would not be trained.
HEAD = "lm_head"


class AdapterArguments(Protocol):
    """The flags that are read here (see --help)."""

    model_name_or_path: str
    local_process_index: int
    freeze_vision_model: bool
    lora_rank: int
    lora_alpha_ratio: float
    lora_dropout: float


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
        config (Phi3VConfig): of the model; its last CLIP layer is never run and gets none.
        args (AdapterArguments): rank and the other flags of LoRA.
    """
    last = config.vision_config.num_hidden_layers - 1  # type: ignore[union-attr]
    targets = [name for name in LANGUAGE_TARGETS if name != HEAD] + ([] if args.freeze_vision_model else VISION_TARGETS)
    alpha = float(args.lora_rank * args.lora_alpha_ratio)
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=args.lora_dropout,
        target_modules=rf"(?!.*\.vision_model\.encoder\.layers\.{last}\.)(.*\.)?({'|'.join(map(re.escape, targets))})",
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )
