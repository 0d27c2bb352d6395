"""Callbacks."""

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from .summary import part_of


def keep_text_activations(model) -> None:
    """`--recompute vision`: of the layers chosen by `activation_checkpointing_enable`, drops those of the language model.

    With a page the vision tower's activations take as much memory as the language model's, for a third of its FLOPs.
    """
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and part_of(name) == "language model":
            module.gradient_checkpointing = False


class GradientCheck(TrainerCallback):
    """After the first optimizer step, stops a run in which a part that should learn received no gradient at all.

    Parameter hooks see the gradient under DDP, DeepSpeed and PEFT alike.
    """

    def __init__(self, model):
        self._hooks, self._seen = [], {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                part = part_of(name)
                self._seen.setdefault(part, [0, 0])
                self._hooks.append(parameter.register_hook(self._watch(part)))

    def _watch(self, part: str):
        def hook(gradient):
            self._seen[part][0] += 1
            self._seen[part][1] += int(bool(gradient.any()))

        return hook

    def on_step_end(self, args, state, control, **kwargs):
        """Sums over all ranks, so that one without an image in its first batch is no fault."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        seen = torch.tensor([self._seen[part] for part in sorted(self._seen)], device=args.device)
        if dist.is_initialized():
            dist.all_reduce(seen)
        for part, (received, nonzero) in zip(sorted(self._seen), seen.tolist(), strict=True):
            if not received:
                raise RuntimeError(
                    f"{part}: expected gradients in the first step, found none: it is cut off from the loss"
                )
            if not nonzero and state.is_world_process_zero:
                print(f"warning: {part}: all gradients of the first step are 0 (no image in its samples?)", flush=True)
