"""The learning rates of a run: one for each part of the model, and with LoRA+ another one for the LoRA matrices B."""

from collections.abc import Sequence
from typing import Any

from peft.optimizers import create_loraplus_optimizer
from torch.optim import Optimizer
from transformers import Trainer

from ..arguments import PARTS, RecipeArguments
from .parts import FLAGS, part_below

FLAG_OF = {part: flag for flag, part in FLAGS.items()}


def rate_of(args: RecipeArguments, part: str) -> float:
    """Peak learning rate of vision, projector or language."""
    own = getattr(args, f"{part}_learning_rate", None)
    return args.learning_rate if own is None else own


def has_rates(args: RecipeArguments) -> bool:
    """Whether there is more than the one rate of --learning_rate."""
    own = (args.vision_learning_rate, args.projector_learning_rate, args.lora_plus_ratio)
    return any(value is not None for value in own)


def describe_rates(args: RecipeArguments) -> str:
    """The peak rates of the parts that are trained, where they have any of their own."""
    if not has_rates(args):
        return ""
    parts = [f"{part} {rate_of(args, part):g}" for part in PARTS if getattr(args, part) != "frozen"]
    if args.lora_plus_ratio is not None:
        return f"{', '.join(parts)}; {args.lora_plus_ratio:g} times as much for the LoRA matrices B"
    return ", ".join(parts)


def lora_plus_optimizer(model, args: RecipeArguments) -> Optimizer:
    """PEFT's optimizer for LoRA+, without the groups that are empty: DeepSpeed stumbles over those."""
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    ratio: Any = args.lora_plus_ratio
    optimizer = create_loraplus_optimizer(
        model, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=args.weight_decay, **settings
    )
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def group_by_rate(groups: Sequence[dict[str, Any]], model, args: RecipeArguments) -> list[dict[str, Any]]:
    """The groups of an optimizer, such as those with and without weight decay, each divided by the parts of the model.

    The language model's come first: the first group's rate is what the Trainer logs as learning_rate.

    Args:
        groups (Sequence): params, lr, weight_decay and others of each; their `lr` is --learning_rate, or LoRA+'s multiple of it.
        model: whose parameters they hold.
        args (RecipeArguments): the rates.
    """
    # With DeepSpeed the Trainer makes its optimizer, once made, another time.
    if not has_rates(args) or any("rate_of" in group for group in groups):
        return list(groups)
    part_of = {id(parameter): FLAG_OF[part_below(name)] for name, parameter in model.named_parameters()}
    divided = []
    for part in reversed(PARTS):
        for group in groups:
            found = [parameter for parameter in group["params"] if part_of[id(parameter)] == part]
            times = group["lr"] / args.learning_rate if args.learning_rate else 1
            name = part if times == 1 else f"{part}_B"
            if found:
                divided.append({**group, "lr": times * rate_of(args, part), "rate_of": name, "params": found})
    return divided


def rates_of(optimizer, learning_rate: float) -> dict[str, float]:
    """learning_rate/PART -> the rate that the step was taken with, where parts have rates of their own.

    Args:
        optimizer: whose groups stand at the next step's rates by now.
        learning_rate (float): what the Trainer logs: the first group's rate in the step. One schedule holds for all groups.
    """
    groups = [group for group in optimizer.param_groups if "rate_of" in group]
    peak = groups[0]["initial_lr"] if groups else 0
    share = learning_rate / peak if peak else 0
    return {f"learning_rate/{group['rate_of']}": share * group["initial_lr"] for group in groups}
