"""--lora_kwargs: the fields of PEFT's LoraConfig that a run may set itself, checked before anything is loaded."""

import difflib
import json
import warnings
from dataclasses import fields
from typing import Any, get_type_hints

from peft import LoraConfig
from pydantic import TypeAdapter, ValidationError

from .errors import InputError

# Set by flags of their own.
BY_FLAG = {
    "r": "--lora_rank",
    "lora_alpha": "--lora_alpha_ratio",
    "lora_dropout": "--lora_dropout",
    "target_modules": "--vision, --projector and --language lora",
    "modules_to_save": "--vision, --projector and --language full",
}
# Beside them what PEFT fills in itself, and what would not be saved, loaded or merged rightly.
LEFT_OUT = {
    **dict.fromkeys(
        ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        "PEFT fills it in",
    ),
    **dict.fromkeys(("megatron_config", "megatron_core"), "it names code to import"),
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), "it wants data or steps of its own"),
    "runtime_config": "it is not saved",
    "layer_replication": "the merged model would have other layers than config.json says",
    "lora_bias": "the language model's layers have no bias that it could be merged into",
    "trainable_token_indices": "such tokens would be lost when the adapter is merged",
    "use_qalora": "it is for weights quantised by GPTQ",
    "target_parameters": "all of this model's large weights are those of layers",
    "alora_invocation_tokens": "such an adapter cannot be merged",
    "arrow_config": "it routes between adapters that are trained already",
    "fan_in_fan_out": "all of this model's layers are Linear",
}  # fmt: skip
# Others need data, or change the base's weights in a way that no loader finds again.
INITIAL = (True, False, "gaussian", "orthogonal", "mica", "pissa", "olora")


def read_lora_kwargs(given: str | dict[str, Any], set_by_flags: dict[str, Any], in_4_bits: bool) -> dict[str, Any]:
    """The fields of --lora_kwargs.

    Args:
        given (str | dict): JSON, or what it holds.
        set_by_flags (dict): r, lora_alpha and lora_dropout, which PEFT holds against the others.
        in_4_bits (bool): whether the language model's weights are nf4.

    Raises:
        InputError: for what is no JSON object, a field that LoraConfig does not have, one that may not be set here, or a
            value that it does not take.
    """
    where = "--lora_kwargs"
    try:
        found = given if isinstance(given, dict) else json.loads(given)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} {str(given):.80}: expected JSON, found: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{where} {str(given):.80}: expected a JSON object, found {type(found).__name__}")
    names, types = [field.name for field in fields(LoraConfig)], get_type_hints(LoraConfig)
    for name, value in found.items():
        if name in BY_FLAG:
            raise InputError(f"{where}: expected {name} to be left out, it follows from {BY_FLAG[name]}")
        if name in LEFT_OUT:
            raise InputError(f"{where}: expected {name} to be left out: {LEFT_OUT[name]}")
        if name not in names:
            close = difflib.get_close_matches(name, [known for known in names if known not in LEFT_OUT], n=2)
            meant = f"; did you mean {' or '.join(close)}?" if close else ""
            raise InputError(f"{where}: expected fields of PEFT's LoraConfig, found {name:.40}{meant}")
        if name == "init_lora_weights":
            _check_initial(value, in_4_bits)
            continue
        try:
            TypeAdapter(types[name]).validate_python(value, strict=True)
        except ValidationError as error:
            first = error.errors()[0]["msg"]
            raise InputError(f"{where}: {name}: expected what LoraConfig takes, found {value!r:.60}: {first}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # target_modules, because a pattern, which it will be, does not go with all fields.
            LoraConfig(target_modules=".*", **set_by_flags, **found)
    except (TypeError, ValueError, ImportError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise InputError(f"{where} {json.dumps(found):.80}: expected fields that go together, found: {first}") from None
    return found


def _check_initial(value: Any, in_4_bits: bool) -> None:
    where = "--lora_kwargs: init_lora_weights"
    if not any(value is known or (isinstance(value, str) and value == known) for known in INITIAL):
        words = ", ".join(json.dumps(known) for known in INITIAL)
        raise InputError(
            f"{where}: expected one of {words}, found {json.dumps(value):.40}; others need data, or change the base's weights at "
            "random, so that nothing could load the adapter again"
        )
    if in_4_bits and value in ("pissa", "olora"):
        raise InputError(
            f"{where} {value} with --use_qlora: expected weights that it can change, found the language model's in 4 bits"
        )
