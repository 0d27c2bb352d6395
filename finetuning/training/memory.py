"""The memory model: what a GPU holds at most in a training step, by what kind of thing it is.

Weights, gradients, optimizer states and DeepSpeed's buffers follow from the number of parameters:

| bytes a parameter | weights | gradients | optimizer | |
|---|---|---|---|---|
| no DeepSpeed, 16 bit | 2 | 2 | 2 + 2 | DistributedDataParallel holds the gradients a second time, in its buckets |
| the same, LoRA | 4 | 4 | 4 + 4 | of the adapters; the frozen weights take 2, or 0.52 in nf4 |
| ZeRO-2 on N GPUs | 2 | 4 / N | 12 / N | float32: gradients summed over micro-batches, weights, two moments |
| ZeRO-1 | 2 | 4 + 4 | 12 / N | the sums a second time in the step; no config of ds_configs/ |
| ZeRO-3 | 2 / N | 4 / N | 12 / N | and the weights of the layers that are just in use, whole |

With an 8-bit AdamW two moments take 2.03 bytes instead of 8 (each block of 256 has a float32 scale), without DeepSpeed instead
of 2 + 2. Offloaded optimizers hold gradients and states in main memory. ZeRO-2's buffers are two buckets of gradients (one without
overlap_comm) and a third into which one is joined while it is summed up, 2 bytes an element, and one weight's gradient in
float32. Read in deepspeed 0.19.8 and held against a real run of it: tests/training/test_memory.py.

What a micro-batch takes besides, its activations, is measured by a step on fake tensors (fake_step.py). For the official sizes
`python -m benchmarks.plan` has taken such steps before and left in activations.json what they depend on; any other model takes
one when it is asked for. All of it counts what torch allocates; what a GPU holds beside is in `usable_bytes`.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from phi3v import Phi3VConfig

from ..arguments import RecipeArguments
from .fake_step import Batch, FakeModel, StepBytes, whole
from .parts import choices_of

GIB = 2**30
STORED = Path(__file__).with_name("activations.json")
# nf4: half a byte, a byte for the scale of 64 weights, and a float32 for each 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
MOMENTS_8_BIT = 2 * (1 + 4 / 256)
# What DeepSpeed takes where a config says nothing. Source: deepspeed/runtime/zero/config.py of 0.19.8.
ZERO_DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_max_live_parameters": 1e9,
    "sub_group_size": 1e9,
}
# Not measured, as no GPU was there: CUDA's context with the kernels, NCCL's buffers; and the share of a GPU that fragments take.
OUTSIDE_TORCH, FRAGMENTS = 1.0 * GIB, 0.03
# A GPU sold as 80 GB has 80 GiB, of which the driver keeps about 1%: 79.2 GiB of an A100.
DRIVER = 0.01


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: in all, quantised to 4 bits, trained; of the largest trained one; bytes of a trained one."""

    all: int
    quantised: int
    trained: int
    largest: int
    trained_bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU at the fullest moment of a training step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def peak(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def usable_bytes(marketed: float) -> float:
    """What training may allocate on a GPU that is sold with so many GB: the driver's part, CUDA's and fragments left out."""
    return allocatable_bytes(marketed * GIB * (1 - DRIVER)) - OUTSIDE_TORCH


def allocatable_bytes(free: float) -> float:
    """What of so many free bytes can be allocated before their fragments are too small."""
    return free * (1 - FRAGMENTS)


def count_parameters(model: FakeModel) -> Parameters:
    """Of a model whose few layers stand for all."""
    trained = [(parameter, times) for parameter, times in model.parameters if parameter.requires_grad]
    packed = sum(p.numel() * times for p, times in model.parameters if id(p) in model.quantised)
    return Parameters(
        sum(parameter.numel() * times for parameter, times in model.parameters),
        packed,
        sum(parameter.numel() * times for parameter, times in trained),
        max(parameter.numel() for parameter, _ in trained),
        trained[0][0].element_size(),
    )


def plan_memory(
    args: RecipeArguments, parameters: Parameters, activations: float, gpus: int, hidden_size: int
) -> Memory:
    """The memory of a GPU in a training step.

    Args:
        args (RecipeArguments): dtype, optimizer, deepspeed_config.
        parameters (Parameters): of the model that is trained.
        activations (float): bytes of a micro-batch.
        gpus (int): of all nodes.
        hidden_size (int): of the language model; DeepSpeed's "auto" goes by it.
    """
    p, in_8_bits = parameters, "8bit" in str(getattr(args.optim, "value", args.optim))
    width = torch.finfo(args.compute_dtype).bits // 8
    frozen = width * (p.all - p.trained - p.quantised) + NF4_BYTES * p.quantised
    config = args.deepspeed_config
    if config is None:
        states = MOMENTS_8_BIT if in_8_bits else 2 * p.trained_bytes
        copies = p.trained_bytes * p.trained
        return Memory(frozen + copies, copies, states * p.trained, activations, copies if gpus > 1 else 0)
    zero = zero_of(args)
    stage, offload = int(zero.get("stage", 0)), is_offloaded(zero, "offload_optimizer")
    of_weights, of_gradients, of_states = (gpus if stage >= least else 1 for least in (3, 2, 1))
    float32_sum = stage == 3 or config.get("data_types", {}).get("grad_accum_dtype") == "fp32" or width == 4
    gradients = (4 if float32_sum else width) * p.trained / of_gradients
    states = (4 + (MOMENTS_8_BIT if in_8_bits else 8)) * p.trained / of_states
    weights = 0 if is_offloaded(zero, "offload_param") else (frozen + width * p.trained) / of_weights
    if offload:
        gradients = states = 0
    bucket, joined = _size(zero, "reduce_bucket_size", hidden_size), 0.0
    joined = min(bucket, p.trained)
    if stage == 3:
        live = _size(zero, "stage3_max_live_parameters", hidden_size)
        live += _size(zero, "stage3_prefetch_bucket_size", hidden_size)
        # The bucket; its sum, and the share of it in float32.
        backward = width * bucket + (width + 4 / gpus) * joined + width * min(p.all, live)
        step = width * bucket + 4 * min(p.trained / of_states, _size(zero, "sub_group_size", hidden_size))
    else:
        buckets = 2 if zero.get("overlap_comm", False) else 1
        backward = width * (buckets * bucket + joined) + 4 * p.largest
        # Without float32 sums the gradients are joined in one row, and that is made float32.
        step = 8 * p.largest if float32_sum else (width + 4) * p.trained / of_states
        if stage == 1 and float32_sum:
            # The sums of all weights, copied; measured with 1, 2 and 4 processes.
            step = 4 * p.trained
    if offload:
        step = 0
    # The optimizer steps when the activations are gone.
    return Memory(weights, gradients, states, activations, max(backward, step - activations))


def main_memory(args: RecipeArguments, parameters: Parameters) -> float:
    """Bytes of main memory that offloaded states take, over all GPUs together."""
    zero = zero_of(args)
    found = 16.0 * parameters.trained if is_offloaded(zero, "offload_optimizer") else 0.0
    return found + (2.0 * parameters.all if is_offloaded(zero, "offload_param") else 0.0)


def zero_of(args: RecipeArguments) -> dict[str, Any]:
    """What a run's DeepSpeed config says of ZeRO; nothing without one."""
    return (args.deepspeed_config or {}).get("zero_optimization", {})


def is_offloaded(zero: dict[str, Any], what: str) -> bool:
    """Whether offload_optimizer or offload_param names a device."""
    return (zero.get(what) or {}).get("device", "none") != "none"


def _size(zero: dict[str, Any], name: str, hidden_size: int) -> float:
    """Elements of a buffer; the Trainer fills "auto" in by the width of the model."""
    value = zero.get(name, ZERO_DEFAULTS[name])
    if value != "auto":
        return float(value)
    return hidden_size**2 * (0.9 if "prefetch" in name else 1)


class Activations:
    """Bytes of a micro-batch of a model that is trained in one way, with any recomputation.

    Args:
        config (Phi3VConfig): sizes of the model.
        args (RecipeArguments): what is trained, see `FakeModel`.
    """

    def __init__(self, config: Phi3VConfig, args: RecipeArguments):
        self.config = config
        self.model = FakeModel(config, args)
        self.parameters = count_parameters(self.model)
        self._stored = stored(config, args)
        self._taken: dict[tuple[Batch, str], StepBytes] = {}

    def of(self, batch: Batch, recompute: str) -> StepBytes:
        """See `StepBytes`; --recompute full, vision or none."""
        if self._stored is None:
            # About a second each in full size: once.
            if (batch, recompute) not in self._taken:
                self._taken[batch, recompute] = whole(self.config, self.model.step(batch, recompute))
            return self._taken[batch, recompute]
        found = self._stored[recompute]
        return StepBytes(max(_value(line, batch) for line in found["peak"]), _value(found["traffic"], batch))


def features(batch: Batch) -> list[float]:
    """What the bytes of a micro-batch depend on: 1, tokens, crops, labels, entries of its mask."""
    rows = batch.rows
    squares = rows * batch.tokens**2 if batch.masked else 0
    return [1, rows * batch.tokens, rows * max(2, batch.crops), rows * batch.labels, squares]


def _value(line: list[float], batch: Batch) -> float:
    return sum(factor * feature for factor, feature in zip(line, features(batch), strict=True))


def sizes_of(config: Phi3VConfig) -> list[int]:
    """The sizes of a model that settle the memory of a step."""
    clip: Any = config.vision_config
    text = [config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers]
    heads = [config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads]
    vision = [clip.image_size, clip.patch_size, clip.hidden_size, clip.intermediate_size, clip.num_hidden_layers]
    return [*text, *heads, *vision]


def course_name(args: RecipeArguments) -> str:
    """The name in activations.json of a way to train. In 4 bits: as LoRA, because no whole weight is there at the peak."""
    trained = choices_of(args).name.removeprefix("q")
    return f"{trained}, {'autocast' if args.deepspeed_config is None else 'DeepSpeed'}"


def stored(config: Phi3VConfig, args: RecipeArguments) -> dict[str, Any] | None:
    """What activations.json has for this model and this way to train it, by recomputation; None if it has nothing."""
    known = _read_stored()
    given = {"sizes": sizes_of(config), "lora_rank": args.lora_rank if args.use_lora else known.get("lora_rank")}
    unlike = args.lora_dropout or args.attention == "eager" or args.compute_dtype == torch.float32
    if unlike or (args.use_lora and args.lora_kwargs) or any(known.get(n) != v for n, v in given.items()):
        return None
    return known["courses"].get(course_name(args))


@cache
def _read_stored() -> dict[str, Any]:
    return json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}
