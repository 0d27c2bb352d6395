"""What the speed benchmarks share: model folders with random weights in three sizes, made images, and a sample to train on."""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from demo import build_config, build_processor, build_tokenizer
from finetuning.arguments import RecipeArguments, parse_args
from finetuning.data.conversation import Conversation, Turn
from phi3v import Phi3VConfig, Phi3VForCausalLM

# Width, height in pixels: a photo fills 13 crops at num_crops 16, a Letter page at 200 dpi and a meme all 17.
IMAGES = {"photo": (640, 480), "page": (1700, 2200), "meme": (200, 200)}
# Width of the language model, layers of the language model, of CLIP. Without CLIP's own sizes, which are the official ones.
SIZES = {"medium": (768, 6, 6), "full": (3072, 32, 24)}
MODELS = ("tiny", *SIZES)
STRATEGIES = {
    "full": [],
    "frozen": ["--freeze_vision_model"],
    "lora": ["--use_lora"],
    "qlora": ["--use_lora", "--use_qlora"],
}


def config(model: str) -> Phi3VConfig:
    """The demo's model, `medium` (172 M parameters) or the official sizes."""
    if model == "tiny":
        return build_config(build_tokenizer())
    width, layers, clip_layers = SIZES[model]
    values = build_config(build_tokenizer()).to_dict()
    head_dim = 96
    return Phi3VConfig(
        **{name: values[name] for name in ("pad_token_id", "bos_token_id", "image_token_id", "end_token_id")},
        vocab_size=32064,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // head_dim,
        num_key_value_heads=width // head_dim,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={
            "type": "su",
            "short_factor": [1.0] * (head_dim // 2),
            "long_factor": [4.0] * (head_dim // 2),
        },
        vision_config={"num_hidden_layers": clip_layers},
    )


def build_folder(model: str, folder: Path, dtype: torch.dtype, device: str = "cpu") -> Path:
    """Writes a model folder with random weights, unless it is there, and returns its path."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        with torch.device(device):
            found = Phi3VForCausalLM._from_config(config(model), dtype=dtype)
        build_processor(build_tokenizer(), found.config).save_pretrained(folder)
        found.save_pretrained(folder)
    return folder


def recipe_arguments(folder: Path, strategy: str, *flags: str) -> RecipeArguments:
    """Arguments as of a recipe's script, for a strategy of `STRATEGIES`; without DeepSpeed."""
    # DeepSpeed, which full and frozen start, is of no use for one process.
    given = [
        *STRATEGIES[strategy],
        *("--deepspeed", "none", "--no-tqdm"),
        *("--output_dir", str(folder.with_name(f"{folder.name}-output"))),
        *flags,
    ]
    return parse_args(["--model_name_or_path", str(folder), "--batch_size", "64", *given])


def base_of(model) -> PreTrainedModel:
    """The Phi3VForCausalLM itself, with adapters or without."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def picture(name: str, seed: int = 0) -> Image.Image:
    """A smooth random image in one of the sizes of `IMAGES`."""
    values = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(IMAGES[name], Image.Resampling.BICUBIC)


def sample(image: str, seed: int = 0) -> Conversation:
    """One image of this size with a question and a short answer, as in DocVQA."""
    return Conversation(
        f"{image}-{seed}", [Turn("What is the number?\nAnswer briefly.", ["1,234.50"], [picture(image, seed)])]
    )


def parser(doc: str, default_model: str = "medium") -> argparse.ArgumentParser:
    """A parser with the flags that the speed benchmarks share."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", choices=MODELS, default=default_model, help=f"size of the model ({default_model})")
    found.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="compute dtype (bfloat16 on a GPU, float32 on a CPU)"
    )
    found.add_argument("--weights", type=Path, help="model folder to use, or to write there if it is missing")
    return found
