"""Loads processor and model, with exactly the parameters trainable that the strategy trains."""

import math
import warnings
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, CLIPVisionConfig, GenerationConfig, PreTrainedModel, set_seed
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor
from phi3v.processing_phi3_v import CHAT_TEMPLATE

from ..arguments import CHOICES, PARTS, RecipeArguments
from ..errors import InputError
from .lora import add_lora, nf4
from .model_folder import check_model_folder
from .parts import modules_of
from .saved import SavedModel, find_saved
from .upload import check_upload
from .weights import load_weights


def load_processor(args: RecipeArguments) -> Phi3VProcessor:
    """Processor of the model, with the run's num_crops; settles `args.max_length` by what the model can take.

    A model on the hub is fetched as a whole. An adapter may stand in a model's place where nothing is trained
    (the arguments then say what it was trained on). With --push_to_hub the repository is created before that.

    Raises:
        InputError: if nothing could be uploaded there, the model cannot be fetched, the folder holds no processor, or another model's.
    """
    if args.upload_to:
        # Before gigabytes are fetched in vain.
        check_upload(args)
    saved = find_saved(args.model_name_or_path, fetches=args.local_process_index == 0)
    if saved.adapter:
        if args.do_train:
            raise InputError(
                f"--model_name_or_path {args.model_name_or_path}: expected a whole model to train on, found an adapter; merge it: "
                f"python -m finetuning.merge {args.model_name_or_path} MERGED, then --model_name_or_path MERGED"
            )
        kept = {part: saved.settings.get(part) for part in PARTS}
        args.train_parts(
            **{part: choice if choice in CHOICES else "lora" for part, choice in kept.items()}, in_4_bits=args.use_qlora
        )
    processor = read_processor(saved, args.num_crops)
    limit = _read_config(saved).max_position_embeddings
    if args.max_length is not None and args.max_length > limit:
        raise InputError(f"--max_length {args.max_length}: expected at most {limit} tokens, which the model can take")
    args.max_length = args.max_length or limit
    return processor


def read_processor(saved: SavedModel, num_crops: int | None = None) -> Phi3VProcessor:
    """The processor of a saved model; an adapter's is its base's.

    The chat template is always phi3v's own: a folder's is a program.

    Args:
        saved (SavedModel): as `find_saved` gives it.
        num_crops (int, optional): most crops of an image; by default as in the folder, so as trained.

    Raises:
        InputError: if there is none, another model's, or one that does not fit config.json.
    """
    check_model_folder(saved.folder, weights=False)
    config = _read_config(saved)
    try:
        processor = AutoProcessor.from_pretrained(saved.folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain ones
        raise InputError(f"{saved.base}: expected a model folder, found: {_first_line(error)}") from error
    if not isinstance(processor, Phi3VProcessor):
        raise InputError(
            f"{saved.base}: expected the processor of a Phi-3-vision model, found {type(processor).__name__}; fetch its "
            "preprocessor_config.json and processor_config.json again"
        )
    check_processor(processor, config, saved.folder)
    processor.chat_template = processor.tokenizer.chat_template = CHAT_TEMPLATE
    processor.image_processor.num_crops = num_crops or saved.num_crops or processor.image_processor.num_crops
    return processor


def _read_config(saved: SavedModel) -> Phi3VConfig:
    try:
        return AutoConfig.from_pretrained(saved.folder, trust_remote_code=False)
    except Exception as error:  # strict dataclasses raise their own kinds
        raise InputError(f"{saved.base}: expected a model folder, found: {_first_line(error)}") from error


def load_model(args: RecipeArguments) -> PreTrainedModel | PeftModel:
    """The model in the run's dtype and attention kernel, with exactly the parameters trainable that the strategy trains.

    Raises:
        InputError: if weights are missing or cannot be read.
    """
    saved = find_saved(args.model_name_or_path, fetches=args.local_process_index == 0)
    # New adapters follow from the seed, whatever drew random numbers before.
    set_seed(args.seed)
    # DeepSpeed splits the weights when training begins (ZeRO-3). Until then each rank holds all of them: it answers with them.
    unset_hf_deepspeed_config()
    try:
        base = read_model(saved, args.compute_dtype, args.attention, args.use_qlora, args.device)
    finally:
        if args.deepspeed:
            set_hf_deepspeed_config(args.hf_deepspeed_config)
    if saved.adapter:
        return read_adapter(base, saved)
    model = set_trainable(base, args)
    if args.compile_options:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                # In place, so that all names stay; one compilation serves all layers of a kind. Last, as a copy is not compiled.
                # dynamic: for all lengths. Sizes that are equal in the first batch count as one, though: where its length is
                # also a width of the model, the second batch compiles once more.
                module.compile(dynamic=True, **args.compile_options)
    return model


def set_trainable(model, args: RecipeArguments) -> PreTrainedModel | PeftModel:
    """The model with exactly the parameters trainable that the strategy trains; adapters are added."""
    # The last CLIP layer is never run: it would wait for gradients that never come.
    unused_layers(model).requires_grad_(False)
    for part, modules in modules_of(model).items():
        if getattr(args, part) == "frozen":
            for module in modules:
                module.requires_grad_(False)
    return add_lora(model, args) if args.use_lora else model


def read_model(
    saved: SavedModel, dtype: torch.dtype, attention: str, in_4_bits: bool, device: torch.device
) -> PreTrainedModel:
    """The whole model that is saved, or the one that an adapter was trained over.

    Args:
        saved (SavedModel): as `find_saved` gives it.
        dtype (torch.dtype): of the weights, and of what is computed with them.
        attention (str): attention implementation, by transformers' name.
        in_4_bits (bool): quantise the language model to nf4.
        device (torch.device): where it goes.

    Raises:
        InputError: if weights are missing or cannot be read.
    """
    check_model_folder(saved.folder)
    level = logging.get_verbosity()
    try:
        # The loading report is a page long; what matters of it is checked below.
        logging.set_verbosity_error()
        model, report = Phi3VForCausalLM.from_pretrained(
            saved.folder,
            trust_remote_code=False,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=nf4(dtype) if in_4_bits else None,
            device_map={"": device},
            output_loading_info=True,
            # Never a pickle, which could run code.
            use_safetensors=True,
            # Reported below, by name.
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{saved.base}: expected weights that fit config.json, found: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(level)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(f"{saved.base}: expected {len(missing)} more weights, first {missing[0]}; is a shard missing?")
    if report["mismatched_keys"]:
        name, *shapes = min(report["mismatched_keys"])
        found, expected = (tuple(shape) for shape in shapes)
        raise InputError(f"{saved.base}: {name}: expected shape {expected} by config.json, found {found}")
    # Of generation_config.json only the ids: its other settings choose strategies, as much memory as they like, and code.
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")
    model.generation_config = GenerationConfig(**{name: getattr(model.generation_config, name) for name in ids})
    # What an adapter names as its base: as the user gave it, not a folder of the hub's cache.
    model.name_or_path = model.config._name_or_path = saved.base
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On a CPU, bitsandbytes packs the weights for inference as soon as the model answers once, and every later
            # training step would silently lose its gradients: the packed product has no backward pass.
            module.support_avx512bf16_for_cpu = False
    return model


def read_adapter(model: PreTrainedModel | PeftModel, saved: SavedModel, name: str = "default") -> PeftModel:
    """The model with the saved adapter over it, nothing trainable; the adapter in float32, as in training.

    Args:
        model: the whole model, or one that has adapters already: the saved one lies beside them then, see `several.py`.
        saved (SavedModel): with an adapter.
        name (str): what PEFT knows the adapter by; the default one where it brings parts that were trained in full.

    Raises:
        InputError: if the adapter does not fit the model.
    """
    try:
        with warnings.catch_warnings():
            # PEFT only warns of weights that are missing.
            warnings.filterwarnings("error", "Found missing adapter keys")
            if isinstance(model, PeftModel):
                model.load_adapter(str(saved.adapter), adapter_name=name)
                return model
            found = PeftModel.from_pretrained(model, str(saved.adapter), adapter_name=name)
        copies = [module for module in found.modules() if isinstance(module, ModulesToSaveWrapper)]
        if copies:
            for module in copies:
                module.modules_to_save.float()
            # Once more: PEFT has rounded the parts that were trained in full to the dtype of the base.
            load_weights(found, cast(Path, saved.adapter))
        return found
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, UserWarning, SafetensorError) as error:
        raise InputError(
            f"{saved.adapter}: expected an adapter of {saved.base}, found: {_first_line(error)}; --base names another base"
        ) from error


def open_model(saved: SavedModel, dtype: torch.dtype, in_4_bits: bool, device: torch.device):
    """A saved model, whole or with its adapter over it, to answer with; see `read_model` and `read_adapter`."""
    model = read_model(saved, dtype, "sdpa", in_4_bits, device)
    return read_adapter(model, saved) if saved.adapter else model


def trained_dtype(saved: SavedModel, device: torch.device) -> torch.dtype:
    """The dtype that a model was trained in, or else that of its weights; one that the device computes in."""
    if saved.settings:
        dtype = torch.bfloat16 if saved.settings.get("bf16") else torch.float32
        dtype = torch.float16 if saved.settings.get("fp16") else dtype
    else:
        dtype = stored_dtype(saved)
    if device.type == "cpu":
        return torch.float32 if dtype == torch.float16 else dtype
    if (
        dtype == torch.bfloat16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return torch.float16
    return dtype


def stored_dtype(saved: SavedModel) -> torch.dtype:
    """Dtype of the weights by config.json."""
    # transformers has made a torch.dtype of its name.
    return cast(torch.dtype, _read_config(saved).dtype or torch.float32)


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
