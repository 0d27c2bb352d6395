"""Checks of a model folder before anything is built from it: files, config.json, the weights' headers, the tokenizer.

A folder may come from anywhere. Nothing here runs its code, unpickles, follows a path out of it, waits for a pipe, or takes
memory that a number in a file asks for.
"""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import CLIPVisionConfig

from phi3v import Phi3VConfig, Phi3VForCausalLM

from ..errors import InputError

MB = 2**20
# Files that transformers reads, with the most bytes of each. The official tokenizer.json has 1.8 MB.
LIMITS = {
    "config.json": MB,
    "generation_config.json": MB,
    "preprocessor_config.json": MB,
    "processor_config.json": MB,
    "video_preprocessor_config.json": MB,
    "tokenizer_config.json": 4 * MB,
    "special_tokens_map.json": MB,
    "added_tokens.json": 4 * MB,
    "chat_template.json": MB,
    "chat_template.jinja": MB,
    "tokenizer.json": 64 * MB,
    "tokenizer.model": 64 * MB,
    "vocab.json": 64 * MB,
    "merges.txt": 64 * MB,
    "model.safetensors.index.json": 64 * MB,
}
# Of what the tokenizer does, beside its vocabulary; the official one has 1.3 kB.
TOKENIZER_RULES = 64 * 1024
# Smallest and largest value of what the model is built from; several times what any model of this kind has.
SIZES = {
    "vocab_size": (1, 2**20),
    "hidden_size": (1, 2**16),
    "intermediate_size": (1, 2**18),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "max_position_embeddings": (1, 2**24),
    "original_max_position_embeddings": (1, 2**24),
    # PreTrainedConfig makes a name for each.
    "num_labels": (0, 1000),
}
VISION_SIZES = {
    **{name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_labels")},
    # The output of the last layer but one is used.
    "num_hidden_layers": (2, 1000),
    "image_size": (1, 4096),
    "patch_size": (1, 4096),
    "projection_dim": (1, 2**16),
    "num_channels": (3, 3),
}
# The official model has 4.1e9.
MAX_PARAMETERS = 2 * 10**10
DTYPES = ("F64", "F32", "F16", "BF16")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LAYERS = {
    "num_hidden_layers": "model.layers.",
    "vision_config.num_hidden_layers": "model.vision_embed_tokens.img_processor.vision_model.encoder.layers.",
}


def is_complete(folder: Path) -> bool:
    """Whether config, tokenizer and weights are there; for a download of which no list of files was kept."""
    if (folder / "adapter_config.json").exists():
        return (folder / "adapter_model.safetensors").exists()
    try:
        return (folder / "tokenizer.json").exists() and all((folder / name).exists() for name in weight_files(folder))
    except InputError:
        return False


def check_model_folder(folder: Path, weights: bool = True) -> None:
    """Holds a folder's small files against what the recipe reads of them, and its weights against config.json.

    Args:
        folder (Path): the folder.
        weights (bool): whether there must be weights; without them a folder is enough to check data with.

    Raises:
        InputError: for the first fault, on one line.
    """
    for name, most in LIMITS.items():
        if os.path.lexists(folder / name):
            check_file(folder / name, folder, most)
    for name in ("additional_chat_templates", "chat_templates"):
        if os.path.lexists(folder / name):
            raise InputError(f"{folder / name}: expected no folder of templates, found one; remove it")
    read = {name: read_json(folder / name) for name in LIMITS if name.endswith(".json") and (folder / name).exists()}
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder / 'adapter_config.json'}: expected a whole model, found an adapter beside config.json; "
            "merge it into its base model, or remove it where it is left over"
        )
    if "config.json" not in read:
        raise InputError(f"{folder}: expected a model folder, found no config.json; give a folder that holds one")
    check_config(read["config.json"], folder / "config.json")
    if "tokenizer.json" in read:
        check_tokenizer(read["tokenizer.json"], folder / "tokenizer.json")
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        for key in ("vocab_file", "tokenizer_file", "merges_file", "spm_file"):
            if read.get(name, {}).get(key) is not None:
                raise InputError(f"{folder / name}: expected no path of another file, found {key}; remove it")
    if weights or any(folder.glob("*.safetensors*")):
        check_weights(folder)


def check_file(path: Path, folder: Path, most: int | None = None) -> None:
    """Checks that a file is a regular one inside the folder, or of the hub's cache, and not too large.

    Raises:
        InputError: if it is missing, a pipe or device, a link out of the folder, or has more than `most` bytes.
    """
    try:
        status, real = os.stat(path), Path(os.path.realpath(path))
    except FileNotFoundError:
        raise InputError(f"{path}: expected this file, found none; fetch the folder again") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: expected a file, found: {reason}; fetch the folder again") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: expected a regular file, found a folder, pipe or device; fetch the folder again")
    if not any(real.is_relative_to(root) for root in _roots(folder)):
        raise InputError(f"{path}: expected a file of this folder, found a link to {real}; copy the file here")
    if most is not None and status.st_size > most:
        raise InputError(f"{path}: expected at most {most} bytes, found {status.st_size}; fetch the folder again")


def _roots(folder: Path) -> list[Path]:
    """Folders that a model's files may lie in: a snapshot of the hub's cache is made of links to blobs beside it."""
    # Not above: it reads the environment when it is imported.
    from huggingface_hub import constants

    real = Path(os.path.realpath(folder))
    roots = [real, Path(os.path.realpath(constants.HF_HUB_CACHE))]
    return [*roots, real.parents[1] / "blobs"] if real.parent.name == "snapshots" else roots


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file whose kind and size are checked.

    Raises:
        InputError: if it is no JSON object, nested too deep, or holds a number that is none (NaN, infinity).
    """

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"the number {text[:20]}")
        return value

    def constant(text: str) -> float:
        raise ValueError(f"the number {text}")

    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_float=number, parse_constant=constant)
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: expected a JSON file, found: {_first_line(error)}; fetch it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}; fetch it again")
    return value


def check_config(config: dict[str, Any], path: Path) -> None:
    """Checks the values of config.json by themselves, before a configuration is made of them.

    Raises:
        InputError: for another model, a size out of bounds, or a setting that would start or fetch something else.
    """
    if config.get("model_type") != "phi3_v":
        raise InputError(
            f"{path}: expected a Phi-3-vision model (model_type 'phi3_v'), found {_short(config.get('model_type'))}; "
            "give another --model_name_or_path"
        )
    for key, why in {
        "quantization_config": "weights that are not quantised",
        "transformers_weights": f"weights in {SINGLE} or shards",
    }.items():
        if config.get(key) is not None:
            raise InputError(f"{path}: expected {why}, found {key}; give the folder of the base model")
    for key, value in _walk(config):
        if "attn_implementation" in key and isinstance(value, str) and "/" in value:
            # A name with a slash is a kernel on the hub: code.
            raise InputError(f"{path}: expected no kernel of the hub, found {key} {_short(value)}; remove it")
        if isinstance(value, int) and abs(value) > 2**31:
            raise InputError(f"{path}: expected numbers under 2**31, found {key} {_short(value)}; fetch it again")
    vision = config.get("vision_config") or {}
    if not isinstance(vision, dict):
        raise InputError(f"{path}: expected vision_config to be an object, found {_short(vision)}; fetch it again")
    _check_sizes(config, SIZES, "", path)
    _check_sizes(vision, VISION_SIZES, "vision_config.", path)
    defaults = Phi3VConfig()
    sizes = {name: config.get(name) or getattr(defaults, name) for name in SIZES if hasattr(defaults, name)}
    heads, groups = sizes["num_attention_heads"], config.get("num_key_value_heads") or sizes["num_attention_heads"]
    _check_divides(sizes["hidden_size"], 2 * heads, "hidden_size", "twice num_attention_heads", path)
    _check_divides(heads, groups, "num_attention_heads", "num_key_value_heads", path)
    width = {name: vision.get(name) or getattr(defaults.vision_config, name) for name in VISION_SIZES}
    _check_divides(
        width["hidden_size"],
        width["num_attention_heads"],
        "vision_config.hidden_size",
        "vision_config.num_attention_heads",
        path,
    )
    head = sizes["hidden_size"] // heads
    if config.get("head_dim") not in (None, head):
        raise InputError(f"{path}: expected head_dim {head}, found {_short(config['head_dim'])}; fetch it again")
    for key in ("rope_scaling", "rope_parameters"):
        _check_rope(config.get(key), head // 2, f"{path}: {key}")
    for key in ("pad_token_id", "bos_token_id", "image_token_id", "end_token_id"):
        value = config.get(key)
        if value is not None and not (_is_int(value) and 0 <= value < sizes["vocab_size"]):
            raise InputError(
                f"{path}: expected {key} from 0 to below vocab_size {sizes['vocab_size']}, found {_short(value)}; fetch it again"
            )


def check_tokenizer(tokenizer: dict[str, Any], path: Path) -> None:
    """Checks what a tokenizer.json makes of a text: no patterns that backtrack without end, no page of replacement.

    Raises:
        InputError: if it holds a regular expression or rules of more than 64 kB.
    """
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        raise InputError(f"{path}: expected a tokenizer, found no model in it; fetch it again")
    rules = {key: value for key, value in tokenizer.items() if key not in ("model", "added_tokens")}
    rules["model"] = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    if any(key == "Regex" for key, _ in _walk(rules)):
        raise InputError(
            f"{path}: expected the rules of Phi-3's tokenizer, found a regular expression; take the base model's file"
        )
    size = len(json.dumps(rules))
    if size > TOKENIZER_RULES:
        raise InputError(
            f"{path}: expected at most {TOKENIZER_RULES} bytes beside the vocabulary, found {size}; take the base model's file"
        )


def weight_files(folder: Path) -> list[str]:
    """Names of the files of weights: the single one, or those that the index lists.

    Raises:
        InputError: if there is none, or the index names anything but safetensors of this folder.
    """
    if os.path.lexists(folder / SINGLE):
        return [SINGLE]
    if not os.path.lexists(folder / INDEX):
        raise InputError(
            f"{folder}: expected weights in {SINGLE} or shards, found none; "
            "pickled weights (.bin, .pt) are never loaded: convert them to safetensors"
        )
    check_file(folder / INDEX, folder, LIMITS[INDEX])
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{folder / INDEX}: expected a weight_map, found none; fetch it again")
    for file in files.values():
        if not isinstance(file, str) or not file.endswith(".safetensors") or os.path.basename(file) != file:
            raise InputError(f"{folder / INDEX}: expected names of .safetensors beside it, found {_short(file)}")
    return sorted(set(files.values()))


def check_weights(folder: Path) -> None:
    """Holds config.json against the headers of the weights; nothing of the size of a weight is made.

    Raises:
        InputError: for weights that are missing, of another shape or dtype, or cannot be read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name in weight_files(folder):
        shapes |= _read_header(folder / name, folder)
    total = sum(math.prod(shape) for shape in shapes.values())
    if total > MAX_PARAMETERS:
        raise InputError(f"{folder}: expected at most {MAX_PARAMETERS:.0e} parameters, found {total:.1e}")
    config = _config(folder)
    # First the number of layers: a model is only sketched once it is known to be no larger than the files.
    vision = cast(CLIPVisionConfig, config.vision_config)  # once it is made
    layers = {
        "num_hidden_layers": config.num_hidden_layers,
        "vision_config.num_hidden_layers": vision.num_hidden_layers,
    }
    for name, prefix in LAYERS.items():
        found = {key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)}
        if len(found) < layers[name] and len(found) < 2:
            raise InputError(
                f"{folder}: expected {layers[name]} layers by {name}, found {len(found)} in the weights; is a shard missing?"
            )
        if len(found) != layers[name]:
            raise InputError(
                f"{folder / 'config.json'}: {name} {layers[name]}: expected {len(found)}, as many as the weights have; "
                "fetch the folder again"
            )
    try:
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in Phi3VForCausalLM(config).state_dict().items()}
    except Exception as error:  # Whatever a configuration makes fail in four constructors.
        raise InputError(
            f"{folder / 'config.json'}: expected a model that can be built, found: {_first_line(error)}; fetch it again"
        ) from None
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    missing = sorted(expected.keys() - shapes.keys())
    if missing:
        raise InputError(f"{folder}: expected {len(missing)} more weights, first {missing[0]}; is a shard missing?")
    for name, shape in sorted(expected.items()):
        if shapes[name] != shape:
            raise InputError(f"{folder}: {name}: expected shape {shape} by config.json, found {shapes[name]}")


def _read_header(path: Path, folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a file."""
    check_file(path, folder)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
            dtypes = {name: tensor.get_dtype() for name, tensor in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path}: expected weights as safetensors, found: {_first_line(error)}; fetch it again"
        ) from None
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise InputError(
                f"{path}: {name}: expected a dtype of {', '.join(DTYPES)}, found {dtype}; give the base model"
            )
    return shapes


def _config(folder: Path) -> Phi3VConfig:
    try:
        return Phi3VConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # strict dataclasses raise their own kinds
        raise InputError(
            f"{folder / 'config.json'}: expected a configuration of Phi-3-vision, found: {_first_line(error)}; fetch it again"
        ) from None


def _check_sizes(values: dict[str, Any], limits: dict[str, tuple[int, int]], prefix: str, path: Path) -> None:
    for name, (least, most) in limits.items():
        value = values.get(name)
        if value is not None and not (_is_int(value) and least <= value <= most):
            raise InputError(
                f"{path}: expected {prefix}{name} to be a whole number from {least} to {most}, found {_short(value)}; "
                "fetch it again"
            )


def _check_divides(whole: int, part: int, name: str, by: str, path: Path) -> None:
    if whole % part:
        raise InputError(f"{path}: expected {name} {whole} to be a multiple of {part} ({by}); fetch it again")


def _check_rope(rope: Any, count: int, where: str) -> None:
    if rope is None:
        return
    if not isinstance(rope, dict):
        raise InputError(f"{where}: expected an object, found {_short(rope)}; fetch it again")
    for key in ("short_factor", "long_factor"):
        factors = rope.get(key, [1] * count)
        if not (
            isinstance(factors, list) and len(factors) == count and all(_is_number(f) and 0 < f < 1e6 for f in factors)
        ):
            raise InputError(f"{where}.{key}: expected {count} numbers over 0, found {_short(factors)}; fetch it again")


def _walk(value: Any) -> list[tuple[str, Any]]:
    """All keys and values of nested objects; a list's items under its key."""
    found, left = [], [("", value)]
    while left:
        key, item = left.pop()
        found.append((key, item))
        if isinstance(item, dict):
            left += item.items()
        elif isinstance(item, list):
            left += [(key, each) for each in item]
    return found


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or nested too deep
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")
