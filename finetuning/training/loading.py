"""Loads processor and model, with exactly the parameters trainable that the strategy trains."""

import math
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, CLIPVisionConfig, GenerationConfig, PreTrainedModel, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor
from phi3v.processing_phi3_v import CHAT_TEMPLATE

from ..arguments import RecipeArguments
from ..data.hub import fetch_model
from ..errors import InputError
from .lora import add_lora, nf4
from .model_folder import check_model_folder, is_complete


def load_processor(args: RecipeArguments) -> Phi3VProcessor:
    """Processor of the model, with the run's num_crops; settles `args.max_length` by what the model can take.

    A model on the hub is fetched as a whole. The chat template is always phi3v's own: a folder's is a program.

    Raises:
        InputError: if the model cannot be fetched, the folder holds no processor, or another model's.
    """
    folder = fetch_model(args.model_name_or_path, is_complete, args.local_process_index == 0)
    check_model_folder(folder, weights=False)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain ones
        raise InputError(
            f"--model_name_or_path {args.model_name_or_path}: expected a model folder, found: {_first_line(error)}"
        ) from error
    if not isinstance(processor, Phi3VProcessor):
        raise InputError(
            f"--model_name_or_path {args.model_name_or_path}: expected the processor of a Phi-3-vision model, found "
            f"{type(processor).__name__}; fetch its preprocessor_config.json and processor_config.json again"
        )
    check_processor(processor, config, folder)
    processor.chat_template = processor.tokenizer.chat_template = CHAT_TEMPLATE
    processor.image_processor.num_crops = args.num_crops
    limit = config.max_position_embeddings
    if args.max_length is not None and args.max_length > limit:
        raise InputError(f"--max_length {args.max_length}: expected at most {limit} tokens, which the model can take")
    args.max_length = args.max_length or limit
    return processor


def load_model(args: RecipeArguments) -> PreTrainedModel:
    """The model in the run's dtype and attention kernel, with exactly the parameters trainable that the strategy trains.

    Raises:
        InputError: if weights are missing or cannot be read.
    """
    folder = fetch_model(args.model_name_or_path, is_complete, args.local_process_index == 0)
    check_model_folder(folder)
    # New adapters follow from the seed, whatever drew random numbers before.
    set_seed(args.seed)
    level = logging.get_verbosity()
    try:
        # The loading report is a page long; what matters of it is checked below.
        logging.set_verbosity_error()
        model, report = Phi3VForCausalLM.from_pretrained(
            folder,
            trust_remote_code=False,
            dtype=args.compute_dtype,
            attn_implementation=args.attention,
            quantization_config=nf4(args.compute_dtype) if args.use_qlora else None,
            device_map={"": args.device},
            output_loading_info=True,
            # Never a pickle, which could run code.
            use_safetensors=True,
            # Reported below, by name.
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{args.model_name_or_path}: expected weights that fit config.json, found: {_first_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(level)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"{args.model_name_or_path}: expected {len(missing)} more weights, first {missing[0]}; is a shard missing?"
        )
    if report["mismatched_keys"]:
        name, *shapes = min(report["mismatched_keys"])
        found, expected = (tuple(shape) for shape in shapes)
        raise InputError(f"{args.model_name_or_path}: {name}: expected shape {expected} by config.json, found {found}")
    # Of generation_config.json only the ids: its other settings choose strategies, as much memory as they like, and code.
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")
    model.generation_config = GenerationConfig(**{name: getattr(model.generation_config, name) for name in ids})
    # What an adapter names as its base: as the user gave it, not a folder of the hub's cache.
    model.name_or_path = model.config._name_or_path = args.model_name_or_path
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On a CPU, bitsandbytes packs the weights for inference as soon as the model answers once, and every later
            # training step would silently lose its gradients: the packed product has no backward pass.
            module.support_avx512bf16_for_cpu = False
    if args.compile_options:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                # In place, so that all names stay; one compilation serves all layers of a kind.
                module.compile(dynamic=True, **args.compile_options)
    # The last CLIP layer is never run: it would wait for gradients that never come.
    unused_layers(model).requires_grad_(False)
    if args.freeze_vision_model:
        model.model.vision_embed_tokens.requires_grad_(False)
    return add_lora(model, args) if args.use_lora else model


def check_processor(processor: Phi3VProcessor, config: Phi3VConfig, folder: Path) -> None:
    """Holds a processor against config.json: crops, image tokens, normalisation, size of the vocabulary.

    Raises:
        InputError: if they do not fit.
    """
    images = processor.image_processor
    crop_size = cast(CLIPVisionConfig, config.vision_config).image_size
    if images.crop_size != crop_size:
        raise InputError(
            f"{folder}: crop_size {images.crop_size} in preprocessor_config.json, "
            f"image_size {crop_size} in config.json: expected the same number of pixels"
        )
    tokens = config.crop_tokens_per_side**2
    if images.num_img_tokens != tokens:
        raise InputError(
            f"{folder}: expected num_img_tokens {tokens} in preprocessor_config.json by config.json, found "
            f"{str(images.num_img_tokens):.40}; fetch it again"
        )
    for name, least in (("image_mean", -math.inf), ("image_std", 0)):
        values = getattr(images, name)
        if len(values) != 3 or not all(isinstance(value, float) and least < value < math.inf for value in values):
            raise InputError(
                f"{folder}: expected {name} to be 3 numbers in preprocessor_config.json, found {str(values):.40}; fetch it again"
            )
    if len(processor.tokenizer) > config.vocab_size:
        raise InputError(
            f"{folder}: expected at most {config.vocab_size} tokens by config.json's vocab_size, found "
            f"{len(processor.tokenizer)} in tokenizer.json; take the base model's file"
        )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def unused_layers(model) -> torch.nn.ModuleList:
    clip = model.model.vision_embed_tokens.img_processor.vision_model
    return torch.nn.ModuleList([clip.encoder.layers[-1], clip.post_layernorm])
