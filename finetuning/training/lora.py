"""LoRA adapters, as the published recipe sets them."""

from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from ..arguments import RecipeArguments

# Published settings: all linear layers of the language model and, unless vision is frozen, of CLIP and the projector.
LANGUAGE_TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"]


VISION_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "img_projection.0", "img_projection.2"]


def nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's quantisation: the language model in 4 bits, double-quantised; the vision part and lm_head as they are."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=["model.vision_embed_tokens", "lm_head"],
    )


def add_lora(model, args: RecipeArguments):
    last = model.config.vision_config.num_hidden_layers - 1
    alpha = float(args.lora_rank * args.lora_alpha_ratio)
    config = LoraConfig(
        r=args.lora_rank,
        # Kept whole where it is: PEFT writes it into adapter_config.json.
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=args.lora_dropout,
        target_modules=LANGUAGE_TARGETS + ([] if args.freeze_vision_model else VISION_TARGETS),
        exclude_modules=rf".*\.vision_model\.encoder\.layers\.{last}\..*",
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    # Without this PEFT would put the whole frozen lm_head into every adapter file, because lm_head is one of the targets.
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    # It would add to a card of the user's own, and leave an empty form in each checkpoint; `results/card.py` writes one.
    model.create_or_update_model_card = lambda _: None
    return model
