"""Loads processor and model, with exactly the parameters trainable that the strategy trains."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, PreTrainedModel, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor

from ..arguments import RecipeArguments
from ..errors import InputError
from .lora import add_lora, nf4


def load_processor(args: RecipeArguments) -> Phi3VProcessor:
    """Processor of the model, with the run's num_crops; settles `args.max_length` by what the model can take.

    Raises:
        InputError: if the folder holds no processor, or another model's.
    """
    for path in Path(args.model_name_or_path).glob("*.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: expected a JSON file, found: {error}; fetch it again") from None
    try:
        config = AutoConfig.from_pretrained(args.model_name_or_path)
        if not isinstance(config, Phi3VConfig):
            raise InputError(
                f"--model_name_or_path {args.model_name_or_path}: expected a Phi-3-vision model, found model_type {config.model_type!r}"
            )
        processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--model_name_or_path {args.model_name_or_path}: expected a model folder, found: {reason}"
        ) from error
    processor.image_processor.num_crops = args.num_crops
    crop_size = config.vision_config.image_size
    if processor.image_processor.crop_size != crop_size:
        raise InputError(
            f"{args.model_name_or_path}: crop_size {processor.image_processor.crop_size} in preprocessor_config.json, "
            f"image_size {crop_size} in config.json: expected the same number of pixels"
        )
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
    # New adapters follow from the seed, whatever drew random numbers before.
    set_seed(args.seed)
    level = logging.get_verbosity()
    try:
        # The loading report is a page long; what matters of it is checked below.
        logging.set_verbosity_error()
        model, report = Phi3VForCausalLM.from_pretrained(
            args.model_name_or_path,
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
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{args.model_name_or_path}: expected weights that fit config.json, found: {reason}"
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


def unused_layers(model) -> torch.nn.ModuleList:
    clip = model.model.vision_embed_tokens.img_processor.vision_model
    return torch.nn.ModuleList([clip.encoder.layers[-1], clip.post_layernorm])
