"""The parts of the model, what each is made of, and what it means that a part is frozen, full or lora: one table for all rooms.

| choice | trained | saved | merged | planned |
|---|---|---|---|---|
| frozen | nothing | with a whole model only | stays the base's | its weights, in the run's dtype |
| full, no LoRA anywhere | every weight | the whole model, official names | nothing to merge | gradients, states; by ZeRO-2 float32 weights |
| full, LoRA elsewhere | a copy of its modules (PEFT's modules_to_save) | the copy, in the adapter | the copy takes the base's place | the copy, float32, and the base's own |
| lora | adapters over its linear layers | the adapter | added to the base's weights | adapters, float32, their gradients and states |

Of the vision tower the last layer and `post_layernorm` are never run, and so never trained. The projector's two separators,
`glb_GN` and `sub_GN`, are bare parameters: where there is LoRA anywhere they stay as they are, because PEFT copies modules.
"""

from dataclasses import astuple, dataclass
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from phi3v import Phi3VConfig

from ..arguments import RecipeArguments

PARTS = ("vision tower", "projector", "language model", "adapters")
# Flag -> part.
FLAGS = {"vision": "vision tower", "projector": "projector", "language": "language model"}
# Linear layers that get adapters. Published: all of the language model's and, unless vision is frozen, those of the other two.
LORA_TARGETS = {
    "vision": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "projector": ["img_projection.0", "img_projection.2"],
    "language": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"],
}


@dataclass(frozen=True)
class Choices:
    """What is trained of each part: frozen, full or lora; `in_4_bits`, whether the language model's frozen weights are nf4."""

    vision: str
    projector: str
    language: str
    in_4_bits: bool = False

    @property
    def adapters(self) -> bool:
        """Whether there is LoRA anywhere: then an adapter is saved, else a whole model."""
        return "lora" in astuple(self)

    @property
    def name(self) -> str:
        """One of `STRATEGIES`, or vision/projector/language: full/full/lora."""
        known = [name for name, choices in STRATEGIES.items() if choices == self]
        language = "qlora" if self.in_4_bits else self.language
        return known[0] if known else f"{self.vision}/{self.projector}/{language}"

    @property
    def flags(self) -> str:
        """As a command has them; none for full fine-tuning."""
        if self.name in PUBLISHED_FLAGS:
            return PUBLISHED_FLAGS[self.name]
        words = [f"--{part} {getattr(self, part)}" for part in FLAGS]
        return " ".join(words + ["--use_qlora"] * self.in_4_bits)


# The published ways to train, by the planner's names.
STRATEGIES = {
    "full": Choices("full", "full", "full"),
    "frozen": Choices("frozen", "frozen", "full"),
    "lora": Choices("lora", "lora", "lora"),
    "qlora": Choices("lora", "lora", "lora", in_4_bits=True),
}
PUBLISHED_FLAGS = {
    "full": "",
    "frozen": "--freeze_vision_model",
    "lora": "--use_lora",
    "qlora": "--use_lora --use_qlora",
}


def choices_of(args: RecipeArguments) -> Choices:
    """What a run trains; None stands nowhere once the arguments are checked."""
    return Choices(str(args.vision), str(args.projector), str(args.language), args.use_qlora)


def choices_named(name: str) -> Choices:
    """The choices of a `Choices.name`."""
    if name in STRATEGIES:
        return STRATEGIES[name]
    vision, projector, language = name.split("/")
    return Choices(vision, projector, language.replace("qlora", "lora"), language == "qlora")


def copied_modules(config: Phi3VConfig, choices: Choices) -> list[str]:
    """Ends of the names of the modules that are trained in full beside LoRA: what PEFT's modules_to_save takes.

    One by one, so that what is never trained is neither copied nor saved: the last layer of the vision tower.
    """
    clip: Any = config.vision_config
    tower = ["embeddings", "pre_layrnorm", *(f"encoder.layers.{n}" for n in range(clip.num_hidden_layers - 1))]
    text = ["embed_tokens", "norm", *(f"layers.{n}" for n in range(config.num_hidden_layers))]
    modules = {
        "vision": [f"vision_model.{name}" for name in tower],
        "projector": ["img_projection"],
        "language": [*(f"model.{name}" for name in text), "lm_head"],
    }
    return [name for part in FLAGS if getattr(choices, part) == "full" for name in modules[part]]


def model_part(name: str) -> str:
    """The part of the model, one of `PARTS`, that a parameter belongs to."""
    return "adapters" if "lora_" in name else part_below(name)


def part_below(name: str) -> str:
    """The part of the model, not the adapters, that a parameter belongs to or, if it is an adapter's, lies over."""
    if ".img_processor." in name:
        return "vision tower"
    return "projector" if ".vision_embed_tokens." in name else "language model"


def modules_of(model: Any) -> dict[str, list[nn.Module | nn.Parameter]]:
    """Flag of a part -> its modules and bare parameters, of a model without adapters."""
    below, images = model.model, model.model.vision_embed_tokens
    return {
        "vision": [images.img_processor],
        "projector": [images.img_projection, images.glb_GN, images.sub_GN],
        "language": [below.embed_tokens, below.layers, below.norm, model.lm_head],
    }


def keep_text_activations(model) -> None:
    """`--recompute vision`: of the layers chosen by `activation_checkpointing_enable`, drops those of the language model.

    With a page the vision tower's activations take as much memory as the language model's, for a third of its FLOPs.
    """
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and model_part(name) == "language model":
            module.gradient_checkpointing = False
