"""How much memory a micro-batch takes beside the weights, from a step of the model itself on fake tensors: no data, no GPU.

A fake tensor has a shape, a dtype and a lifetime, and nothing in it (torch's FakeTensorMode). What every kernel makes is
followed until the last reference to it is gone, forward and backward, so that whatever a layer keeps, computes again or needs
in passing is counted as it is. The step runs four layers of each kind; what a middle one takes stands for all those between
the first and the last. Gradients of weights count until they are finished: where they stay is for memory.py to say.
"""

import copy
import re
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer

from phi3v import Phi3VConfig, Phi3VForCausalLM
from phi3v.modeling_phi3_v import SDPA_PACKED

from ..arguments import RecipeArguments
from .loading import set_trainable
from .lora import nf4
from .parts import keep_text_activations, model_part, part_below

# Of each kind, in a fake step; the last one of CLIP is never run.
TEXT_LAYERS, VISION_LAYERS = 4, 5
# Attention by the causal kernel, which needs no mask; transformers would make one wherever it looks into fake tensors in vain.
WITHOUT_MASK = "sdpa_without_mask"
AttentionInterface.register(WITHOUT_MASK, sdpa_attention_forward)
AttentionMaskInterface.register(WITHOUT_MASK, lambda *_, **__: None)
# Weights that QLoRA quantises, by their names under adapters.
IN_4_BITS = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.(base_layer\.)?weight$")
# Kernels whose time goes by their FLOPs, not by the bytes that they read and write; and a view that is not called one.
FREE = ("::mm", "::addmm", "::bmm", "::baddbmm", "::convolution", "::_scaled_dot_product", "::_unsafe_view")


@dataclass(frozen=True)
class Batch:
    """A micro-batch: `rows` samples of `tokens` and `labels` each, with one image of `crops` (0: text alone).

    `masked`: the rows are of several lengths and so attend by a mask. `packed`: padding-free, all in one row.
    """

    rows: int
    tokens: int
    crops: int
    labels: int
    masked: bool = False
    packed: bool = False


@dataclass
class StepBytes:
    """Bytes of a micro-batch: the most at once beside weights and finished gradients (`peak`), and those that its kernels read
    and write, products of matrices and attention left out (`traffic`); where a step was taken, the FLOPs of these."""

    peak: float
    traffic: float
    flops: float = 0.0


@dataclass
class Segment:
    """What happens up to a mark: bytes more at its end than at its start, the most above its start, bytes read and written, FLOPs."""

    mark: tuple[str, str]
    change: float
    peak: float
    traffic: float
    flops: float


class Live(TorchDispatchMode):
    """Follows the memory that operations make, beside the weights of `model`; `mark` cuts its course into segments."""

    def begin(self, model) -> None:
        """Begins anew; what is a weight of `model` does not count."""
        self.segments: list[Segment] = []
        self.backward = False
        self.live = self.peak = self._start = self._traffic = self._flops = 0
        weights = (*model.parameters(), *model.buffers())
        self._seen = {tensor.untyped_storage()._cdata for tensor in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        made = [value for value in tree_leaves(found) if isinstance(value, torch.Tensor) and not value.is_meta]
        for tensor in made:
            self._note(tensor.untyped_storage())
        if made and not func.is_view and not any(name in func.name() for name in FREE):
            read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
            self._traffic += sum(tensor.nbytes for tensor in (*made, *read))
        self._flops += _flops(func, args, kwargs or {}, found)
        return found

    def _note(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def mark(self, *name: str) -> None:
        """Ends a segment: a pass and the kind of layer, or others."""
        change, peak = self.live - self._start, self.peak - self._start
        self.segments.append(Segment((name[0], name[-1]), change, peak, self._traffic, self._flops))
        self._start = self.peak = self.live
        self._traffic = self._flops = 0


def _flops(func, args, kwargs, found) -> float:
    """FLOPs of a product of matrices, a convolution or an attention; of a causal one half, since its kernels skip the other."""
    if "_scaled_dot_product" not in func.name():
        count = flop_registry.get(func.overloadpacket)
        return count(*args, **kwargs, out_val=found) if count else 0
    backward = "backward" in func.name()
    queries, keys = args[1:3] if backward else args[:2]
    causal = kwargs.get("is_causal", args[7] if backward else args[4] if len(args) > 4 else False)
    # Two products; five in the backward pass, which computes the weights of the values again.
    products = 5 if backward else 2
    return products * 2 * queries.numel() * keys.shape[-2] / (2 if causal else 1)


class _LayerNormInFloat32(TorchFunctionMode):
    """On a GPU autocast computes layer norms in float32; on a CPU, where fake tensors are, it leaves them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.layer_norm and torch.is_autocast_enabled("cpu"):
            args = [value.float() if isinstance(value, torch.Tensor) else value for value in args]
        return func(*args, **(kwargs or {}))


class _Known(list):
    """Numbers in the place of a tensor of them, which a fake one could not say."""

    def diff(self):
        return self

    def tolist(self):
        return list(self)


class _DequantisedProduct(torch.autograd.Function):
    """A product with a 4-bit weight, which is made whole in passing, forward and backward."""

    @staticmethod
    def forward(ctx, states, shape):
        ctx.shape = shape
        return nn.functional.linear(states, states.new_empty(shape))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ gradient.new_empty(ctx.shape), None


def _quantised_forward(module, states):
    product = _DequantisedProduct.apply(states.to(module.compute_dtype), (module.out_features, module.in_features))
    return product.to(states.dtype)


class FakeModel:
    """The model as a run trains it, of few layers and fake tensors; `step` runs a micro-batch on it.

    Args:
        config (Phi3VConfig): sizes of the model.
        args (RecipeArguments): what is trained: strategy, LoRA, dtype, DeepSpeed or not.
        text_layers, vision_layers (int): layers that are run; more than the config's count as those.
    """

    def __init__(
        self,
        config: Phi3VConfig,
        args: RecipeArguments,
        text_layers: int = TEXT_LAYERS,
        vision_layers: int = VISION_LAYERS,
    ):
        self.config = config
        if args.lora_kwargs:
            # An initial value that is computed from weights has none here.
            args = copy.copy(args)
            args.lora_kwargs = {**cast(dict, args.lora_kwargs), "init_lora_weights": False}
        # Autocast, which accelerate leaves to DeepSpeed, keeps copies of the weights that it casts.
        self._autocast = args.deepspeed_config is None and args.compute_dtype != torch.float32
        self._eager = args.attention == "eager"
        few: Any = copy.deepcopy(config)
        few.num_hidden_layers = min(text_layers, few.num_hidden_layers)
        few.vision_config.num_hidden_layers = min(vision_layers, few.vision_config.num_hidden_layers)
        # float16 takes as much as bfloat16, and a CPU computes less with it.
        dtype = torch.float32 if args.compute_dtype == torch.float32 else torch.bfloat16
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            self.model: Any = Phi3VForCausalLM._from_config(few, dtype=dtype)
            # DoRA reads whole weights while it is made; in passing, as it does in 4 bits.
            dora = bool(cast(dict, args.lora_kwargs or {}).get("use_dora"))
            if args.use_qlora and not dora:
                _quantise(self.model, dtype)
            self.model = set_trainable(self.model, args)
            if args.deepspeed_config is not None:
                # As DeepSpeed does it, with adapters too.
                self.model.to(dtype)
        self.model.train()
        self.parameters = list(self._all_parameters(few))
        # Ids of the weights that are in 4 bits in a run.
        self.quantised = {
            id(parameter)
            for name, parameter in self.model.named_parameters()
            if args.use_qlora and IN_4_BITS.search(name)
        }
        self._mode, self.live = FakeTensorMode(), Live()
        with self._mode:
            _replace_by_fakes(self.model)
            _mark_layers(self.model, self.live)

    def _all_parameters(self, few) -> Iterable[tuple[nn.Parameter, int]]:
        """Each parameter with how often it stands in a model of all layers."""
        missing = {
            "language model": self.config.num_hidden_layers - few.num_hidden_layers,
            "vision tower": self.config.vision_config.num_hidden_layers - few.vision_config.num_hidden_layers,  # type: ignore[union-attr]
        }
        for name, parameter in self.model.named_parameters():
            yield parameter, 1 + (missing[part_below(name)] if ".layers.1." in name else 0)

    def step(self, batch: Batch, recompute: str) -> list[Segment]:
        """The course of the forward and backward pass of one micro-batch, with --recompute full, vision or none."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        base.activation_checkpointing_disable()
        if recompute != "none":
            base.activation_checkpointing_enable()
        if recompute == "vision":
            keep_text_activations(base)
        attention = SDPA_PACKED if batch.packed else "sdpa" if batch.masked else WITHOUT_MASK
        base.set_attn_implementation("eager" if self._eager else attention)
        live = self.live
        live.begin(self.model)
        with self._mode, live, _LayerNormInFloat32():
            inputs = _inputs(batch, self.config)
            with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
                loss = self.model(**inputs).loss
            live.mark("forward", "loss")
            loss.backward()
            del loss, inputs
            live.mark("backward", "rest")
        _let_go(self.config, live.segments)
        return live.segments


def _quantise(model, dtype: torch.dtype) -> None:
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    settings = nf4(dtype)
    replace_with_bnb_linear(model, settings.llm_int8_skip_modules, settings)
    model.is_loaded_in_4bit = True
    for module in model.modules():
        if hasattr(module, "compute_dtype") and hasattr(module, "quant_state"):
            module.forward = partial(_quantised_forward, module)


def _replace_by_fakes(model) -> None:
    """Gives every parameter and buffer a fake tensor on the CPU; those that are shared stay so."""
    fakes: dict[int, Any] = {}
    for module in model.modules():
        for states in (module._parameters, module._buffers):
            for name, value in states.items():
                if value is None:
                    continue
                if id(value) not in fakes:
                    fake = torch.empty(value.shape, dtype=value.dtype)
                    if isinstance(value, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=value.requires_grad)
                    if fake.requires_grad:
                        fake.register_post_accumulate_grad_hook(_drop_gradient)
                    fakes[id(value)] = value, fake
                states[name] = fakes[id(value)][1]


def _drop_gradient(parameter) -> None:
    parameter.grad = None


def _mark_layers(model, live: Live) -> None:
    """Marks where each layer's forward pass ends, and where its backward pass begins."""

    def begin_backward(kind, _):
        live.backward = True
        live.mark("backward", kind)

    def after(kind, _module, _inputs, output):
        if live.backward:  # a layer that is computed again
            return
        live.mark("forward", kind)
        if output.requires_grad:
            output.register_hook(partial(begin_backward, kind))

    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_hook(partial(after, model_part(name)))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # What they look into, fake tensors cannot say.
    base.model.vision_embed_tokens.images_per_row = lambda *_: None
    base._loss = partial(_loss, base)


def _loss(model, hidden_states, labels, *_):
    """`Phi3VForCausalLM._loss`, the labels in known places: a fake tensor could not say where they are."""
    rows, count = labels
    picked = torch.arange(rows * count)
    logits = model.lm_head(hidden_states[:, :-1].flatten(0, 1)[picked]).float()
    return nn.functional.cross_entropy(logits, torch.zeros(rows * count, dtype=torch.long), reduction="sum")


def _inputs(batch: Batch, config: Phi3VConfig) -> dict[str, Any]:
    rows, length = (1, batch.rows * batch.tokens) if batch.packed else (batch.rows, batch.tokens)
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(rows, length, dtype=torch.long),
        "labels": (batch.rows, batch.labels),
    }
    if batch.packed:
        inputs["cu_seq_lens_q"] = _Known([batch.tokens] * batch.rows)
        inputs["position_ids"] = torch.zeros(1, length, dtype=torch.long)
    elif batch.masked:
        inputs["attention_mask"] = torch.ones(rows, 1, length, length, dtype=torch.bool)
        inputs["position_ids"] = torch.zeros(rows, length, dtype=torch.long)
    if batch.crops:
        size = config.vision_config.image_size  # type: ignore[union-attr]
        crops = max(2, batch.crops)
        inputs["pixel_values"] = torch.empty(batch.rows * crops, 3, size, size)
        inputs["image_sizes"] = _Known([[(crops - 1) * size, size]] * batch.rows)
    return inputs


def repeated(config: Phi3VConfig, found: list[Segment]) -> list[tuple[int, int]]:
    """The segments by number, in their order, each with how often it comes in a step of all layers: a middle one for many."""
    layers = {
        "language model": config.num_hidden_layers,
        "vision tower": config.vision_config.num_hidden_layers - 1,  # type: ignore[union-attr]
    }
    numbers: dict[tuple[str, str], list[int]] = {}
    for number, segment in enumerate(found):
        numbers.setdefault(segment.mark, []).append(number)
    times = [1] * len(found)
    for (_, kind), same in numbers.items():
        if kind in layers and len(same) > 2:
            times[same[len(same) // 2]] += layers[kind] - len(same)
    return list(enumerate(times))


def _let_go(config: Phi3VConfig, found: list[Segment]) -> None:
    """Has the loss's segment free what every layer keeps up to there, of the layers too that are not run: autocast's copies of
    the adapters' weights. Nothing of a layer is left when its step is done, so that is what would be left of them."""
    left = sum((times - 1) * found[number].change for number, times in repeated(config, found))
    (loss,) = [segment for segment in found if segment.mark == ("forward", "loss")]
    loss.change -= left


def whole(config: Phi3VConfig, found: list[Segment]) -> StepBytes:
    """Puts the segments of all layers together."""
    live = peak = traffic = flops = 0.0
    for number, times in repeated(config, found):
        segment = found[number]
        for _ in range(times):
            peak = max(peak, live + segment.peak)
            live += segment.change
        traffic += times * segment.traffic
        flops += times * segment.flops
    return StepBytes(peak, traffic, flops)
