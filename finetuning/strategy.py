"""Loads model and processor, and makes trainable what the strategy trains: full, frozen vision, LoRA, QLoRA."""

import json
import math
import os
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, BitsAndBytesConfig, PreTrainedModel, TrainerCallback, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor

from .arguments import RecipeArguments
from .conversation import ConversationDataset
from .errors import InputError

# Published settings: all linear layers of the language model and, unless vision is frozen, of CLIP and the projector.
LANGUAGE_TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"]
VISION_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "img_projection.0", "img_projection.2"]

PARTS = ("vision tower", "projector", "language model", "adapters")


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


def nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's quantisation: the language model in 4 bits, double-quantised; the vision part and lm_head as they are."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=["model.vision_embed_tokens", "lm_head"],
    )


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
            attn_implementation=args.kernel,
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
    _unused(model).requires_grad_(False)
    if args.freeze_vision_model:
        model.model.vision_embed_tokens.requires_grad_(False)
    return _add_lora(model, args) if args.use_lora else model


def _unused(model) -> torch.nn.ModuleList:
    clip = model.model.vision_embed_tokens.img_processor.vision_model
    return torch.nn.ModuleList([clip.encoder.layers[-1], clip.post_layernorm])


def _add_lora(model, args: RecipeArguments):
    last = model.config.vision_config.num_hidden_layers - 1
    alpha = float(args.lora_rank * args.lora_alpha_ratio)
    config = LoraConfig(
        r=args.lora_rank,
        # Kept whole where it is: PEFT writes it into adapter_config.json.
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        lora_dropout=args.lora_dropout,
        target_modules=LANGUAGE_TARGETS + ([] if args.freeze_vision_model else VISION_TARGETS),
        exclude_modules=rf".*\.vision_model\.encoder\.layers\.{last}\..*",
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    # Without this PEFT would put the whole frozen lm_head into every adapter file, because lm_head is one of the targets.
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    return model


def part_of(name: str) -> str:
    """The part of the model, one of `PARTS`, that a parameter belongs to."""
    if "lora_" in name:
        return "adapters"
    if ".img_processor." in name:
        return "vision tower"
    return "projector" if ".vision_embed_tokens." in name else "language model"


def keep_text_activations(model) -> None:
    """`--recompute vision`: of the layers chosen by `activation_checkpointing_enable`, drops those of the language model.

    With a page the vision tower's activations take as much memory as the language model's, for a third of its FLOPs.
    """
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and part_of(name) == "language model":
            module.gradient_checkpointing = False


def describe(model, args: RecipeArguments, dataset: ConversationDataset) -> str:
    """What will be trained, and how, as a table to print before training."""
    counts = defaultdict(lambda: [0, 0, set()])
    for name, parameter in model.named_parameters():
        # Two 4-bit weights are packed in one byte.
        size = parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
        trainable, frozen, dtypes = counts[part_of(name)]
        counts[part_of(name)][0 if parameter.requires_grad else 1] += size
        dtypes.add("nf4" if parameter.dtype == torch.uint8 else str(parameter.dtype).removeprefix("torch."))
    lines = [f"{'part':<16}{'trainable':>16}{'frozen':>16}  dtype"]
    for part in PARTS:
        trainable, frozen, dtypes = counts[part]
        if trainable + frozen:
            lines.append(f"{part:<16}{trainable:>16,}{frozen:>16,}  {', '.join(sorted(dtypes))}")
    total = sum(count[0] + count[1] for count in counts.values())
    trained = sum(count[0] for count in counts.values())
    lines.append(f"{'all':<16}{trained:>16,}{total - trained:>16,}  {trained / total:.2%} trainable")
    ranks, micro = args.world_size, args.per_device_train_batch_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(len(dataset) // args.batch_size * args.num_train_epochs)
    again = len(dataset) - len(dataset.rows)
    kernel = args.kernel
    if args.use_flash_attention and kernel.startswith("sdpa"):
        kernel = f"{kernel} (flash-attn is not installed: PyTorch's own flash kernel)"
    engine = (
        f"DeepSpeed, {os.path.relpath(args.deepspeed)}"
        if args.deepspeed
        else "DistributedDataParallel"
        if ranks > 1
        else "one process"
    )
    lines += [
        f"strategy         {args.strategy}; {engine}",
        f"device           {_device_name(args)}; compute {str(args.compute_dtype).removeprefix('torch.')}; attention {kernel}; recomputed: {args.recompute}"
        + ("; layers compiled" if args.compile_options else ""),
        f"effective batch  {args.batch_size} = {ranks} rank(s) x {micro} micro-batch x {args.gradient_accumulation_steps} accumulation",
        f"steps            {steps}, the first {args.get_warmup_steps(steps)} of them warm-up",
        f"rows             {len(dataset.rows)}"
        + (f", {again} of them twice in each epoch to fill its last step" if again else ""),
    ]
    if args.device.type == "cuda" and torch.cuda.device_count() > int(ranks):
        lines.append(
            f"note             {torch.cuda.device_count()} GPUs here, {ranks} used: torchrun --nproc_per_node=N uses more"
        )
    return "\n".join(lines)


def _device_name(args: RecipeArguments) -> str:
    return torch.cuda.get_device_name() if args.device.type == "cuda" else str(args.device)


class GradientCheck(TrainerCallback):
    """After the first optimizer step, stops a run in which a part that should learn received no gradient at all.

    Parameter hooks see the gradient under DDP, DeepSpeed and PEFT alike.
    """

    def __init__(self, model):
        self._hooks, self._seen = [], {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                part = part_of(name)
                self._seen.setdefault(part, [0, 0])
                self._hooks.append(parameter.register_hook(self._watch(part)))

    def _watch(self, part: str):
        def hook(gradient):
            self._seen[part][0] += 1
            self._seen[part][1] += int(bool(gradient.any()))

        return hook

    def on_step_end(self, args, state, control, **kwargs):
        """Sums over all ranks, so that one without an image in its first batch is no fault."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        seen = torch.tensor([self._seen[part] for part in sorted(self._seen)], device=args.device)
        if dist.is_initialized():
            dist.all_reduce(seen)
        for part, (received, nonzero) in zip(sorted(self._seen), seen.tolist(), strict=True):
            if not received:
                raise RuntimeError(
                    f"{part}: expected gradients in the first step, found none: it is cut off from the loss"
                )
            if not nonzero and state.is_world_process_zero:
                print(f"warning: {part}: all gradients of the first step are 0 (no image in its samples?)", flush=True)
