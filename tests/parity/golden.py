"""The golden numbers of the official code, and the recipe of the weights and images they were recorded with.

The recipe is that of ../shared/golden/README.md; the numbers lie in data/.
"""

import functools
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor

DATA = Path(__file__).parent / "data"
# The official tokenizer, too large to commit: tests that need it are skipped where it is missing.
OFFICIAL_FOLDER = Path(__file__).parents[2].parent / "shared" / "phi35v"

# Bounds: DESIGN.md, 'Parity bar'.
LOGIT_BOUND = 1e-4
GRADIENT_BOUND = 1e-4  # relative to the norm of the parameter's gradient
ROUNDING_BOUND = 1e-5  # of the total norm; a gradient below it is only rounding
IMAGE_TOKEN_ID = 32044


@functools.cache
def manifest(name: str) -> dict:
    return json.loads((DATA / f"{name}.json").read_text())


@functools.cache
def arrays(name: str):
    return np.load(DATA / f"{name}.npz")


def case(name: str, key: str, field: str = "name") -> dict:
    (found,) = [case for case in manifest(name)["cases"] if case[field] == key]
    return found


def names(name: str, field: str = "name") -> list[str]:
    return [case[field] for case in manifest(name)["cases"]]


def input_ids(recorded: np.ndarray) -> torch.Tensor:
    """The official code marks the positions of image N by -N; here they hold `<|image|>`."""
    return torch.from_numpy(np.where(recorded < 0, IMAGE_TOKEN_ID, recorded).astype(np.int64))


def check(record_property, quantity: str, found, expected, bound: float = LOGIT_BOUND) -> None:
    """Asserts |found - expected| <= bound everywhere and records the largest deviation for the table at the end."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    largest = float(np.abs(found - expected).max(initial=0))
    deviation = {"quantity": quantity, "largest": largest, "bound": bound, "values": found.size}
    record_property("deviation", deviation)
    # `not >` would let nan pass
    assert largest <= bound, f"{quantity}: {largest:.1e} from the official code, allowed {bound:.1e}"


def uniform(seed: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), float64, from splitmix64."""
    z = (np.uint64(seed) << np.uint64(32)) ^ np.arange(count, dtype=np.uint64)
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2**-53


def parameter(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value of the parameter `name` in the golden model, float32."""
    fan_in = int(np.prod(shape[1:]))
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
        offset, amplitude = 1, 0.2
    elif name.endswith(("embed_tokens.weight", "position_embedding.weight", "class_embedding")):
        offset, amplitude = 0, 0.5
    elif name.endswith(("glb_GN", "sub_GN")):
        offset, amplitude = 0, 1.0
    elif name.endswith(".bias"):
        offset, amplitude = 0, 0.1
    elif name.endswith(("lm_head.weight", "qkv_proj.weight", ".o_proj.weight")):
        offset, amplitude = 0, 2 * (3 / fan_in) ** 0.5
    elif name.endswith((".q_proj.weight", ".k_proj.weight")):
        offset, amplitude = 0, 1.5 * (3 / fan_in) ** 0.5
    else:
        offset, amplitude = 0, (3 / fan_in) ** 0.5
    values = offset + amplitude * (2 * uniform(zlib.crc32(name.encode()), int(np.prod(shape))) - 1)
    return torch.from_numpy(values.astype(np.float32)).view(shape)


def build_model() -> Phi3VForCausalLM:
    """The golden model: the official config.json, made small, with the parameters of the recipe."""
    recorded = manifest("model_forward")
    values = json.loads((DATA / "config.json").read_text())
    config = Phi3VConfig(**{**values, **recorded["reduced_config"], "vision_config": recorded["reduced_clip"]})
    model = Phi3VForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(parameter(name, tensor.shape))
    return model.eval()


def image(width: int, height: int, mode: str, pattern: str) -> Image.Image:
    """The test image of a manifest entry [width, height, mode, pattern]."""
    a, b, d, e, g, k = (manifest("image_processor")["patterns"][pattern][key] for key in "abdegk")
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]

    def channel(c):
        value = (a * (c + 1) * x) // d + (b * (3 - c) * y) // d + k * ((x // e) ^ (y // e)) + (x * y) // (16 * d)
        return ((value + g * (c + 1)) % 256).astype(np.uint8)

    if mode in ("RGB", "RGBA", "CMYK"):
        return Image.merge(mode, [Image.fromarray(channel(c)) for c in range(len(mode))])
    grey = Image.fromarray(channel(0))
    if mode == "1":
        return grey.point(lambda value: 255 * (value > 127)).convert("1", dither=Image.Dither.NONE)
    if mode == "P":
        palette = [value for i in range(256) for value in ((a * i + 5) % 256, (b * i + 90) % 256, 255 - i)]
        grey = Image.frombytes("P", grey.size, grey.tobytes())
        grey.putpalette(palette)
    return grey


def pixels(case: dict) -> dict[str, torch.Tensor]:
    """pixel_values and image_sizes of a model case; nothing for a case without images."""
    if "synth" in case:  # pixels that need no image library
        crops = []
        for number, (height, width) in enumerate(case["synth"]):
            shape = (1 + (height // 336) * (width // 336), 3, 336, 336)
            seed = zlib.crc32(f"pixels/public/{case['name']}/{number}".encode())
            crops.append(
                torch.from_numpy((4 * uniform(seed, int(np.prod(shape))) - 1.8).astype(np.float32)).view(shape)
            )
        return {"pixel_values": torch.cat(crops), "image_sizes": torch.tensor(case["synth"])}
    if not case["images"]:
        return {}
    features = Phi3VImageProcessor()([image(*entry) for entry in case["images"]], num_crops=case["nc"])
    return {key: features[key] for key in ("pixel_values", "image_sizes")}
