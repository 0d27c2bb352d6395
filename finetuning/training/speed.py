"""How long a training step may take on a GPU that is not here: an estimate from FLOPs, bytes and the card's data sheet."""

from dataclasses import dataclass

from .fake_step import Batch
from .fitting import Planner, Setting
from .flops import step_flops
from .memory import is_offloaded, zero_of
from .parts import choices_named

# Shares of the data sheet that long products and long copies are assumed to reach; no GPU has confirmed them.
OF_FLOPS, OF_BANDWIDTH = 0.75, 0.8
# Bytes a second of each GPU over PCI Express, and of its share of main memory, for offloaded states.
PCIE, MAIN_MEMORY = 2e10, 1e10
ADAMW_BYTES = 28  # read and written for a parameter: gradient, weight and two moments in float32


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: GB as sold, dense 16-bit FLOP/s, bytes a second, those to its neighbours, bfloat16 or not."""

    memory: float
    flops: float
    bandwidth: float
    link: float
    bf16: bool = True


# Source: NVIDIA's data sheets (dense tensor-core rates with float32 sums); the link where NVLink is usual, else PCI Express.
CARDS = {
    "T4": Card(16, 65e12, 3.2e11, PCIE, bf16=False),
    "RTX3090": Card(24, 71e12, 9.36e11, PCIE),
    "RTX4090": Card(24, 165e12, 1.008e12, PCIE),
    "L4": Card(24, 121e12, 3e11, PCIE),
    "V100": Card(32, 125e12, 9e11, 1e11, bf16=False),
    "A100-40": Card(40, 312e12, 1.555e12, 2e11),
    "RTXA6000": Card(48, 155e12, 7.68e11, PCIE),
    "RTX8000": Card(48, 130e12, 6.72e11, PCIE, bf16=False),
    "L40S": Card(48, 362e12, 8.64e11, PCIE),
    "A100": Card(80, 312e12, 2.04e12, 2e11),
    "H100": Card(80, 989e12, 3.35e12, 3e11),
    "H200": Card(141, 989e12, 4.8e12, 3e11),
}
# What is meant where only the memory is said.
USUAL = ("T4", "RTX3090", "V100", "A100-40", "RTXA6000", "A100", "H200")


def usual_card(memory: float) -> str:
    """The name of the card that most likely has so many GB."""
    return min(USUAL, key=lambda name: abs(CARDS[name].memory - memory))


def step_seconds(
    planner: Planner, setting: Setting, card: Card, batch_size: int, tokens: float, squares: float, crops: float
) -> float:
    """Seconds of an optimizer step.

    Args:
        planner (Planner): of the run.
        setting (Setting): how it is trained.
        card (Card): each of the planner's GPUs.
        batch_size (int): samples of the step over all GPUs.
        tokens, squares, crops (float): of a mean sample; squares of its length.
    """
    samples = batch_size / planner.gpus
    micro_batches = max(1, samples / setting.micro_batch)
    compute = samples * _sample_seconds(planner, setting, card, tokens, squares, crops)
    between = _between(planner, setting, card, micro_batches)
    # Gradients travel while the next layers are computed.
    return max(compute, between) + _optimizer_seconds(planner, setting, card, micro_batches)


def _sample_seconds(planner: Planner, setting: Setting, card: Card, tokens, squares, crops) -> float:
    rank, choices = planner.args.lora_rank, choices_named(setting.strategy)
    frozen = choices.vision == "frozen"
    config, labels = planner.config, planner.labels
    found = step_flops(config, int(tokens), int(squares), int(crops), labels, choices, rank)
    vision = step_flops(config, 0, 0, int(crops), 0, choices, rank)["forward"]
    again = {"none": 0, "vision": 0 if frozen else vision, "full": found["forward"] - (vision if frozen else 0)}
    flops = found["step"] + again[setting.recompute]
    batch = Batch(1, int(tokens), int(crops), labels)
    traffic = planner.activations(setting).of(batch, setting.recompute).traffic
    return flops / (card.flops * OF_FLOPS) + traffic / (card.bandwidth * OF_BANDWIDTH)


def _between(planner: Planner, setting: Setting, card: Card, micro_batches: float) -> float:
    """Seconds in which the GPUs tell each other gradients and weights, 2 bytes each."""
    parameters, others = planner.activations(setting).parameters, (planner.gpus - 1) / planner.gpus
    if setting.deepspeed == "none":
        return 2 * parameters.trained_bytes * parameters.trained * others / card.link
    stage = zero_of(planner.arguments(setting)).get("stage", 0)
    if stage == 3:
        # The weights of each layer, forward and backward, and its gradients.
        return micro_batches * (4 * parameters.all + 2 * parameters.trained) * others / card.link
    # Summed for all and kept by one; the new weights, once. Before stage 2 the sums of an optimizer step, in float32.
    sums = micro_batches * 4 if stage == 2 else 8
    return (sums + 2) * parameters.trained * others / card.link


def _optimizer_seconds(planner: Planner, setting: Setting, card: Card, micro_batches: float) -> float:
    parameters, zero = planner.activations(setting).parameters, zero_of(planner.arguments(setting))
    share = parameters.trained / (1 if setting.deepspeed == "none" else planner.gpus)
    if not is_offloaded(zero, "offload_optimizer"):
        return ADAMW_BYTES * share / (card.bandwidth * OF_BANDWIDTH)
    moved = (micro_batches + 1) * 2 * share
    if is_offloaded(zero, "offload_param"):
        moved += micro_batches * 4 * parameters.all / planner.gpus
    return moved / PCIE + ADAMW_BYTES * share / MAIN_MEMORY
