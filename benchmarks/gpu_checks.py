"""Whether the model gives the right numbers on a device: kernels, masks, precision, adapters, compiled layers.

    python -m benchmarks.gpu_checks --device cuda --out checks.json

Each check is a deviation from numbers recorded with the official code (tests/parity), or from the same computation in float32
with eager attention, and a bound. On a CPU the same checks run in `make test`, so that only the device is new to them. Written
after each check; the exit status is 1 if one does not hold.
"""

import argparse
import copy
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters

from finetuning.environment import prepare_process
from finetuning.training.lora import OneProduct
from finetuning.training.parts import LORA_TARGETS
from phi3v.modeling_phi3_v import SDPA_PACKED

from .record import ROOT, provenance, write

sys.path.insert(0, str(ROOT / "tests" / "parity"))
import golden  # noqa: E402

# Relative; bfloat16 rounds by 0.4%, and errors add up over the layers.
ROUNDING = 0.05
# Of gradients, whose rounding this model amplifies: how much more of it there may be than with plain operations. Chance alone
# makes it 2.4 on a CPU.
MORE_ROUNDING = 4
# On a GPU lengths at which cuDNN's masked backward pass is reported wrong, source: pytorch/pytorch issue 196678. A CPU, which has
# no such kernel, is spared them.
LENGTHS = {"cuda": (64, 192), "cpu": (16, 48)}


build_model = functools.cache(golden.build_model)


def model_on(device: str, attention: str, dtype: torch.dtype = torch.float32):
    """The golden model."""
    model = copy.deepcopy(build_model())
    model.set_attn_implementation(attention)
    return model.to(device, dtype)


def recorded_batch(name: str, device: str) -> dict[str, torch.Tensor]:
    recorded = golden.arrays("model_forward")
    batch = {
        "input_ids": golden.input_ids(recorded[f"{name}/input_ids"]),
        "attention_mask": torch.from_numpy(recorded[f"{name}/attention_mask"].astype(np.int64)),
        "labels": torch.from_numpy(recorded[f"{name}/labels"].astype(np.int64)),
        **golden.pixels(golden.case("model_forward", name)),
    }
    return {key: value.to(device) for key, value in batch.items()}


@torch.no_grad()
def official_numbers(device: str, attention: str) -> float:
    """Largest deviation of the normaliser of the logits, float32; infinite where another token is the likeliest."""
    model, largest = model_on(device, attention), 0.0
    recorded = golden.arrays("model_forward")
    for name in golden.names("model_forward"):
        batch = recorded_batch(name, device)
        logits = model(**batch, logits_to_keep=0).logits
        is_token = batch["attention_mask"].bool().cpu().numpy()
        found = logits.logsumexp(-1).cpu().numpy()
        largest = max(largest, float(np.abs(found - recorded[f"{name}/logsumexp"])[is_token].max()))
        clear = is_token & (recorded[f"{name}/margin"] > 1e-3)
        if (logits.argmax(-1).cpu().numpy() != recorded[f"{name}/argmax"])[clear].any():
            return float("inf")
    return largest


@torch.no_grad()
def official_loss(device: str) -> float:
    """Largest relative deviation of the loss in bfloat16 with sdpa."""
    model, recorded = model_on(device, "sdpa", torch.bfloat16), golden.arrays("model_forward")
    losses = {}
    for name in golden.names("model_forward"):
        batch = recorded_batch(name, device)
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].bfloat16()
        losses[name] = (float(model(**batch).loss), float(recorded[f"{name}/loss"]))
    return max(abs(found - expected) / expected for found, expected in losses.values())


def prompts(lengths: tuple[int, ...], device: str, side: str = "left") -> dict[str, torch.Tensor]:
    """Texts of these lengths in tokens in one batch, padded on one side; each token but a text's first is a label."""
    generator, longest = torch.Generator().manual_seed(0), max(lengths)
    ids, mask = torch.full((len(lengths), longest), 32000), torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        where = slice(longest - length, None) if side == "left" else slice(0, length)
        ids[row, where] = torch.randint(3, 31000, (length,), generator=generator)
        mask[row, where] = 1
    # Padding on the left comes before the first.
    labels = ids.masked_fill((mask == 0) | (mask.cumsum(-1) == 1), -100)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


@torch.no_grad()
def padding(device: str) -> float:
    """What padding on the left changes of the last logits in bfloat16, in standard deviations of the logits."""
    model, batch = model_on(device, "sdpa", torch.bfloat16), prompts(LENGTHS[device], device)
    together = model(batch["input_ids"], batch["attention_mask"], logits_to_keep=1).logits[:, -1].float()
    largest = 0.0
    for row, length in enumerate(LENGTHS[device]):
        alone = model(batch["input_ids"][row : row + 1, -length:], logits_to_keep=1).logits[0, -1].float()
        deviation = (together[row] - alone).abs().max() / alone.std()
        largest = max(largest, float(deviation.nan_to_num(float("inf"))))
    return largest


def answers(device: str) -> float:
    """Share of the recorded answers that a padded batch of them in float32 does not give."""
    model, names = model_on(device, "sdpa"), golden.names("generation")
    ids = [golden.input_ids(golden.arrays("generation")[f"{name}/input_ids"]).view(-1) for name in names]
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=32000, padding_side="left")
    mask = torch.stack([torch.arange(batch.shape[1]) >= batch.shape[1] - len(prompt) for prompt in ids]).long()
    (images,) = [found for name in names if (found := golden.pixels(golden.case("generation", name)))]
    images = {key: value.to(device) for key, value in images.items()}
    given = {"input_ids": batch.to(device), "attention_mask": mask.to(device), **images}
    new = model.generate(**given, do_sample=False, max_new_tokens=12)[:, batch.shape[1] :].tolist()
    wrong = [found != golden.case("generation", name)["new_ids"] for found, name in zip(new, names, strict=True)]
    return sum(wrong) / len(wrong)


def gradients_of(model, batch: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    device = batch["input_ids"].device.type
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        model(**batch).loss.backward()
    return torch.cat([p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm; infinite if something is not finite."""
    return float(((found - expected).norm() / expected.norm()).nan_to_num(float("inf")))


def backward(device: str, dtype: torch.dtype) -> float:
    """How far sdpa's gradients of padded texts are from those of eager attention in float32; in bfloat16 over what eager rounds off."""
    exact, plain = model_on(device, "eager").train(), model_on(device, "eager", dtype).train()
    model, worst = model_on(device, "sdpa", dtype).train(), 0.0
    for longest in LENGTHS[device]:
        for side in ("left", "right"):
            batch = prompts((longest, longest // 2, 5), device, side)
            expected, rounded, found = (gradients_of(way, batch, torch.float32) for way in (exact, plain, model))
            unit = 1.0 if dtype == torch.float32 else relative(rounded, expected)
            worst = max(worst, relative(found, expected) / unit)
    return worst


def packed(device: str) -> float:
    """Gradients of a padding-free row against those of the padded batch, both in bfloat16."""
    lengths = LENGTHS[device]
    batch, model = prompts(lengths, device, "right"), model_on(device, SDPA_PACKED, torch.bfloat16).train()
    rows = [{key: value[row, :length] for key, value in batch.items()} for row, length in enumerate(lengths)]
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    row = {
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
        "position_ids": torch.cat([torch.arange(length, device=device) for length in lengths])[None],
        "labels": torch.cat([row["labels"] for row in rows])[None],
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds),
        **dict.fromkeys(("max_length_q", "max_length_k"), max(lengths)),
    }
    return relative(gradients_of(model, row, torch.float32), gradients_of(model, batch, torch.float32))


def adapters(device: str) -> float:
    """What LoRA as the recipe computes it rounds off the gradients in bfloat16, over what PEFT's own way does."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    batch, found = prompts(LENGTHS[device], device, "right"), []
    for dtype, own in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        torch.manual_seed(0)
        config = LoraConfig(r=8, target_modules=LORA_TARGETS["language"], init_lora_weights=False)
        model: Any = get_peft_model(model_on(device, "sdpa", dtype), config).train()
        for layer in model.modules():
            if own and isinstance(layer, LoraLayer):
                layer.lora_variant, layer.cast_input_dtype_enabled = {"default": OneProduct()}, False
        found.append(gradients_of(model, batch, dtype))
    exact, peft, ours = found
    return relative(ours, exact) / relative(peft, exact)


def compiled(device: str) -> float:
    """Gradients of compiled layers against eager ones; infinite if a second batch of another length compiles them anew."""
    # Of no length that is also a width of the model: such a size would count as one with it (finetuning/training/loading.py).
    first, second = ((200, 64, 77), (300, 77)) if device == "cuda" else ((50, 16, 19), (75, 19))
    model, batch = model_on(device, "sdpa", torch.bfloat16).train(), prompts(first, device, "right")
    expected = gradients_of(model, batch, torch.float32)
    counters.clear()
    for layer in model.model.layers:
        layer.compile(dynamic=True, backend="inductor" if device == "cuda" else "aot_eager")
    found = gradients_of(model, batch, torch.float32)
    before = counters["stats"]["unique_graphs"]
    gradients_of(model, prompts(second, device, "right"), torch.float32)
    return relative(found, expected) if before == counters["stats"]["unique_graphs"] > 0 else float("inf")


# What is checked, its bound, and how.
CHECKS: dict[str, tuple[float, Callable[[str], float]]] = {
    "padded texts, gradients in float32": (1e-3, functools.partial(backward, dtype=torch.float32)),
    "padded texts, gradients in bfloat16": (MORE_ROUNDING, functools.partial(backward, dtype=torch.bfloat16)),
    "padded texts, last logits in bfloat16": (3 * ROUNDING, padding),
    "official numbers, float32, sdpa": (1e-3, functools.partial(official_numbers, attention="sdpa")),
    "official numbers, float32, eager": (1e-3, functools.partial(official_numbers, attention="eager")),
    "official losses, bfloat16, sdpa": (ROUNDING, official_loss),
    "recorded answers in a padded batch, float32": (0.0, answers),
    "padding-free row": (ROUNDING, packed),
    "LoRA with one product": (MORE_ROUNDING, adapters),
    "compiled layers": (ROUNDING, compiled),
}


def run_checks(device: str, names: list[str]) -> Iterator[dict[str, Any]]:
    """Each check with what it found."""
    for name in names:
        (bound, check), start = CHECKS[name], time.perf_counter()
        try:
            found, seconds = check(device), round(time.perf_counter() - start, 1)
            yield {"check": name, "deviation": found, "bound": bound, "holds": found <= bound, "seconds": seconds}
        except Exception as error:  # the other checks go on: the device is borrowed
            yield {"check": name, "bound": bound, "holds": False, "error": f"{type(error).__name__}: {error}"[:500]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    prepare_process(args.device == "cpu", None, 600, 10**9)
    found: list[dict[str, Any]] = []
    for check in run_checks(args.device, list(CHECKS)):
        found.append(check)
        print(
            f"{'holds' if check['holds'] else 'FAILS'}  {check['check']:46}{check.get('deviation', check.get('error'))}  "
            f"({check.get('seconds', '')} s)",
            flush=True,
        )
        write(args.out, provenance("torch", "transformers", "peft") | {"device": args.device, "checks": found})
    sys.exit(not all(check["holds"] for check in found))


if __name__ == "__main__":
    main()
