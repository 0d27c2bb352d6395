"""Model FLOPs of a training step, and the rate of a large matrix product that they are held against (MFU).

Model FLOPs are those that the training needs, whoever computes more (recomputation, padding, unused layers, other logits):
2 a multiply-add. A linear layer takes 2 x tokens x in x out, a causal attention 2 x tokens^2 x width, CLIP's 4 x tokens^2 x
width; counted are real crops, the CLIP layers that are used, and lm_head at the labels. The backward pass takes as much
again for the gradient of the input, down to the first part that is trained, and as much for that of a weight that is trained
in full. A LoRA pair of rank r adds 2 x tokens x r x (in + out), three times.
"""

import time

import torch

from phi3v import Phi3VConfig

from .parts import STRATEGIES, Choices


def step_flops(
    config: Phi3VConfig,
    tokens: int,
    squared_lengths: int,
    crops: int,
    labels: int,
    choices: Choices = STRATEGIES["full"],
    lora_rank: int = 0,
) -> dict[str, int]:
    """Model FLOPs of a forward pass and of a whole step; the module's docstring has the formula.

    Args:
        config (Phi3VConfig): sizes of the model.
        tokens (int): of all samples, image tokens included.
        squared_lengths (int): sum of the squares of the samples' lengths in tokens.
        crops (int): real crops of all images, global views included.
        labels (int): supervised positions.
        choices (Choices): what is trained.
        lora_rank (int): of the LoRA matrices, where there are any.
    """
    clip, width = config.vision_config, config.hidden_size
    patches = (clip.image_size // clip.patch_size) ** 2
    qkv = width + 2 * width * (config.num_key_value_heads or config.num_attention_heads) // config.num_attention_heads
    clip_tokens, clip_layers = crops * (patches + 1), clip.num_hidden_layers - 1
    # Without the separators: a few in a hundred.
    image_tokens = crops * patches // 4
    # How often it is run, on how many tokens, inputs, outputs.
    text = [
        (config.num_hidden_layers, tokens, width, qkv),
        (config.num_hidden_layers, tokens, width, width),
        (config.num_hidden_layers, tokens, width, 2 * config.intermediate_size),
        (config.num_hidden_layers, tokens, config.intermediate_size, width),
        (1, labels, width, config.vocab_size),
    ]
    tower = [
        (4 * clip_layers, clip_tokens, clip.hidden_size, clip.hidden_size),
        (2 * clip_layers, clip_tokens, clip.hidden_size, clip.intermediate_size),
    ]
    projector = [(1, image_tokens, 4 * clip.hidden_size, width), (1, image_tokens, width, width)]
    # The pixels need no gradient, so that the patch embedding has none for its input.
    patch_embedding = 2 * crops * patches * 3 * clip.patch_size**2 * clip.hidden_size
    text_attention = 2 * config.num_hidden_layers * width * squared_lengths
    tower_attention = 4 * clip_layers * clip.hidden_size * crops * (patches + 1) ** 2
    parts = {
        "vision": (tower, patch_embedding, tower_attention),
        "projector": (projector, 0, 0),
        "language": (text, 0, text_attention),
    }
    forward = backward = 0
    reached = False
    # From the pixels to the loss: behind a part that is trained all others hand their gradients down.
    for part, (products, first, attention) in parts.items():
        choice = getattr(choices, part)
        reached = reached or choice != "frozen"
        adapters = sum(2 * n * t * lora_rank * (i + o) for n, t, i, o in products) if choice == "lora" else 0
        weights = sum(2 * n * t * i * o for n, t, i, o in products)
        forward += weights + first + attention + adapters
        # An attention multiplies two inputs: both get a gradient, whatever is trained.
        backward += reached * (weights + 2 * attention) + 2 * adapters + (choice == "full") * (weights + first)
    return {"forward": forward, "step": forward + backward}


def matmul_rate(device: str, dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of a product of two square matrices; the best of several."""
    factor = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(20 if device == "cuda" else 4):
        start = _now(device)
        factor @ factor
        best = min(best, _now(device) - start)
    return 2 * size**3 / best


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
