"""The parts of the model, by the names of its parameters and layers."""

from transformers.modeling_layers import GradientCheckpointingLayer

PARTS = ("vision tower", "projector", "language model", "adapters")


def model_part(name: str) -> str:
    """The part of the model, one of `PARTS`, that a parameter belongs to."""
    if "lora_" in name:
        return "adapters"
    if ".img_processor." in name:
        return "vision tower"
    return "projector" if ".vision_embed_tokens." in name else "language model"


def keep_text_activations(model) -> None:
    """`--recompute vision`: of the layers chosen by `activation_checkpointing_enable`, drops those of the language model.

    With a page the vision tower's activations take as much memory as the language model's, for a third of its FLOPs.
    """
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and model_part(name) == "language model":
            module.gradient_checkpointing = False
