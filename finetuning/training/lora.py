"""LoRA adapters, as the published recipe sets them, and copies of the parts that are trained in full beside them."""

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig, CLIPVisionConfig

from phi3v import Phi3VConfig

from ..arguments import RecipeArguments, set_by_flags
from .parts import FLAGS, LORA_TARGETS, choices_of, copied_modules

# What an adapter_config.json may hold for PEFT 0.12, which refuses any other key.
# Source: https://github.com/huggingface/peft/blob/v0.12.0/src/peft/tuners/lora/config.py
PEFT_0_12 = {
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config"),
    *("megatron_core", "loftq_config", "use_dora", "layer_replication"),
}


def nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's quantisation: the language model in 4 bits, double-quantised; the vision part and lm_head as they are."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=["model.vision_embed_tokens", "lm_head"],
    )


class OneProduct(LoraVariant):
    """LoRA as PEFT computes it, within rounding, but with the second product, its scaling and the sum in one kernel.

    PEFT's own way takes three, and under autocast it first copies the input to float32. A variant is how PEFT lets a layer compute
    in another way; it calls them private, so requirements.txt pins PEFT, and a test holds this one against PEFT's own.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_) -> torch.Tensor:
        """`result`, (..., out), of the base layer, plus the adapter's share for its input `x`, (..., in)."""
        down, up = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        if not torch.is_autocast_enabled(x.device.type):
            x, result = x.to(down.dtype), result.to(down.dtype)
        hidden = linear(module.lora_dropout[active_adapter](x), down)
        scaled = (up * module.scaling[active_adapter]).t()
        return torch.addmm(result.flatten(0, -2), hidden.flatten(0, -2), scaled).view_as(result)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight + module.get_delta_weight(active_adapter)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight - module.get_delta_weight(active_adapter)


def target_modules(config: Phi3VConfig, names: Iterable[str]) -> str:
    """The pattern of the layers that get adapters: those whose names end so, but for the last CLIP layer, which is never run."""
    # Not exclude_modules, which PEFT knows since 0.14: older ones could not load the adapter.
    last = cast(CLIPVisionConfig, config.vision_config).num_hidden_layers - 1
    return rf"(?!.*\.vision_model\.encoder\.layers\.{last}\.)(.*\.)?({'|'.join(map(re.escape, names))})"


def add_lora(model, args: RecipeArguments):
    """The model with adapters over the parts that are lora, and copies of the parts that are full.

    Without DeepSpeed, which keeps float32 weights of its own, all that is trained is float32, and computed under autocast.
    """
    choices = choices_of(args)
    targets = [name for part in FLAGS if getattr(choices, part) == "lora" for name in LORA_TARGETS[part]]
    given: Any = args.lora_kwargs or {}
    config = LoraConfig(
        **set_by_flags(args),
        target_modules=target_modules(model.config, targets),
        modules_to_save=copied_modules(model.config, choices) or None,
        task_type="CAUSAL_LM",
        **{"init_lora_weights": "gaussian", **given},
    )
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    model = get_peft_model(model, config)
    _freeze_biases(model, frozen)
    if args.deepspeed_config is None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            if not layer.lora_variant:
                layer.lora_variant = dict.fromkeys(layer.lora_A, OneProduct())
            # Autocast takes the weights to the input's dtype, which costs a hundredth of the opposite.
            layer.cast_input_dtype_enabled = False
    model.save_pretrained = partial(_save_adapter, model.save_pretrained)
    # It would add to a card of the user's own, and leave an empty form in each checkpoint; `results/card.py` writes one.
    model.create_or_update_model_card = lambda _: None
    return model


def _freeze_biases(model, frozen: set[str]) -> None:
    """`bias` of --lora_kwargs trains biases, of frozen parts too, and of the layer that is never run: those stay as they are."""
    for name, parameter in model.named_parameters():
        if name.removeprefix("base_model.model.").replace(".base_layer", "") in frozen:
            parameter.requires_grad_(False)


def _save_adapter(save: Callable[..., None], folder: str, **kwargs) -> None:
    """PEFT's save_pretrained; adapter_config.json is left with what PEFT 0.12 knows, and whatever else is not a default."""
    # Without save_embedding_layers PEFT would put the whole frozen lm_head into every file, because lm_head is a target.
    save(folder, save_embedding_layers=False, **kwargs)
    path = Path(folder) / "adapter_config.json"
    defaults = LoraConfig().to_dict()
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key in PEFT_0_12 or value != defaults.get(key)}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
