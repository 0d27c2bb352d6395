"""A tiny Phi-3-vision for the tests: crops of 28 pixels, 2 x 2 image tokens each, short rope up to 64 tokens."""

import numpy as np
import torch
from PIL import Image

from demo import build_tokenizer
from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor

CROP, SIDE = 28, 2  # pixels, image tokens
TOKENIZER = build_tokenizer()
LONG_AFTER = 64  # tokens


def config(**changes) -> Phi3VConfig:
    values = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": TOKENIZER.pad_token_id,
        "bos_token_id": TOKENIZER.bos_token_id,
        "image_token_id": TOKENIZER.convert_tokens_to_ids("<|image|>"),
        "end_token_id": TOKENIZER.convert_tokens_to_ids("<|end|>"),
        "max_position_embeddings": 32 * LONG_AFTER,
        "original_max_position_embeddings": LONG_AFTER,
        "rope_scaling": {
            "type": "su",
            "short_factor": np.linspace(1, 1.3, 16).tolist(),
            "long_factor": np.linspace(1.5, 20, 16).tolist(),
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": CROP,
            "patch_size": CROP // SIDE // 2,
        },
    }
    return Phi3VConfig(**{**values, **changes})


def model(seed: int = 0, attention: str = "eager", **changes) -> Phi3VForCausalLM:
    """Random float32 weights, large enough that every part of the model moves the logits."""
    found = Phi3VForCausalLM._from_config(config(**changes), attn_implementation=attention, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in found.named_parameters():
            values = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.copy_(values * 0.1 + (1 if "norm" in name and name.endswith("weight") else 0))
            else:
                scale = 1 if name.endswith(("embed_tokens.weight", "GN")) else 1.5 * tensor[0].numel() ** -0.5
                tensor.copy_(values * scale)
        # as in every freshly built or official model, the row of the padding token is not random
        found.model.embed_tokens.weight[found.config.pad_token_id] = 0
    return found.eval()


def processor(num_crops: int = 4) -> Phi3VProcessor:
    image_processor = Phi3VImageProcessor(num_crops=num_crops, crop_size=CROP, num_img_tokens=SIDE**2)
    return Phi3VProcessor(image_processor, build_tokenizer())


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)
