"""What fits on a GPU: rows of settings with their memory, the recomputation that a run takes, and what would have fitted."""

import copy
import json
import shlex
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import Any

import torch
from accelerate.utils import gather_object

from phi3v import Phi3VConfig
from phi3v.modeling_phi3_v import IGNORE_INDEX

from ..arguments import ZERO2, RecipeArguments
from ..data.dataset import ConversationDataset
from ..errors import RunError
from .fake_step import Batch
from .memory import GIB, OUTSIDE_TORCH, Activations, Memory, allocatable_bytes, plan_memory
from .parts import STRATEGIES, choices_named, choices_of

# From the least computed to the least memory.
RECOMPUTE = ("none", "vision", "full")


@dataclass(frozen=True)
class Setting:
    """What decides on the memory of a run: a strategy (`Choices.name`), --deepspeed as `read_deepspeed` takes it, and so on."""

    strategy: str
    deepspeed: str
    recompute: str
    micro_batch: int

    def flags(self) -> str:
        """As a command has them, without those that are defaults."""
        usual = "none" if "lora" in self.strategy else ZERO2.stem
        words = [
            choices_named(self.strategy).flags,
            f"--deepspeed {shlex.quote(self.deepspeed)}" * (self.deepspeed != usual),
        ]
        words += [f"--recompute {self.recompute}", f"--batch_size_per_gpu {self.micro_batch}" * (self.micro_batch > 1)]
        return " ".join(word for word in words if word)


@cache
def deepspeed_configs() -> dict[str, dict[str, Any] | None]:
    """Name -> content of the tested DeepSpeed configs, the least spread one first; none is None."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(ZERO2.parent.glob("*.json"))}
    return {"none": None, **found}


class Planner:
    """The memory of settings of a run.

    Args:
        config (Phi3VConfig): sizes of the model.
        args (RecipeArguments): all that a setting does not say: dtype, optimizer, LoRA's rank, padding_free.
        gpus (int): of all nodes.
        tokens, crops, labels (int): of the largest sample.
    """

    def __init__(
        self, config: Phi3VConfig, args: RecipeArguments, gpus: int, tokens: int, crops: int, labels: int = 12
    ):
        self.config, self.args, self.gpus = config, args, gpus
        self.tokens, self.crops, self.labels = tokens, crops, labels
        self._activations: dict[tuple[str, bool], Activations] = {}

    def arguments(self, setting: Setting) -> RecipeArguments:
        """The run's arguments with this setting."""
        args = copy.copy(self.args)
        RecipeArguments.train_parts(args, *astuple(choices_named(setting.strategy)))
        # Of any other name: the run's own.
        args.deepspeed_config = deepspeed_configs().get(setting.deepspeed, self.args.deepspeed_config)
        args.recompute, args.per_device_train_batch_size = setting.recompute, setting.micro_batch
        return args

    def batch(self, rows: int) -> Batch:
        """As many samples, each as large as the largest; by padding several lengths need a mask."""
        packed = self.args.padding_free
        return Batch(rows, self.tokens, self.crops, self.labels, masked=rows > 1 and not packed, packed=packed)

    def activations(self, setting: Setting) -> Activations:
        """Of the setting's model; a model of this kind is built once."""
        key = setting.strategy, setting.deepspeed == "none"
        if key not in self._activations:
            self._activations[key] = Activations(self.config, self.arguments(setting))
        return self._activations[key]

    def memory(self, setting: Setting) -> Memory:
        """Of one GPU."""
        model = self.activations(setting)
        taken = model.of(self.batch(setting.micro_batch), setting.recompute).peak
        args = self.arguments(setting)
        return plan_memory(args, model.parameters, taken, self.gpus, self.config.hidden_size)


def setting_of(args: RecipeArguments, recompute: str | None = None) -> Setting:
    """The setting of a run."""
    known = deepspeed_configs()
    same = [name for name, config in known.items() if config == args.deepspeed_config]
    engine = same[0] if same else args.deepspeed if isinstance(args.deepspeed, str) else json.dumps(args.deepspeed)
    return Setting(choices_of(args).name, engine, recompute or args.recompute, args.per_device_train_batch_size)


def smaller(setting: Setting) -> Iterable[Setting]:
    """Settings that take less than this one, those that change least of the result and of the speed first."""
    recompute = RECOMPUTE[RECOMPUTE.index(setting.recompute) + 1 :] if setting.recompute in RECOMPUTE else ()
    rows = [setting.micro_batch // 2**power for power in range(1, 12) if setting.micro_batch >> power]
    for name in recompute:
        yield Setting(setting.strategy, setting.deepspeed, name, setting.micro_batch)
    for count in rows:
        yield Setting(setting.strategy, setting.deepspeed, "full", count)
    engines = list(deepspeed_configs())
    if "lora" not in setting.strategy and setting.deepspeed in engines:
        wider = ["zero2", "zero3", "zero2_offload", "zero3_offload"]
        start = wider.index(setting.deepspeed) + 1 if setting.deepspeed in wider else 0
        for engine in wider[start:]:
            if engine in engines:
                yield Setting(setting.strategy, engine, "full", 1)
    strategies = list(STRATEGIES)
    # Of parts that were chosen one by one: those that take least.
    start = strategies.index(setting.strategy) + 1 if setting.strategy in STRATEGIES else strategies.index("lora")
    for strategy in strategies[start:]:
        yield Setting(strategy, "none" if "lora" in strategy else setting.deepspeed, "full", 1)


def largest_sample(dataset: ConversationDataset) -> tuple[int, int, int]:
    """Tokens, crops and labels of the sample with most tokens."""
    index = max(range(len(dataset)), key=dataset.lengths.__getitem__)
    sample = dataset[index]
    if sample is None:  # damaged, and left out
        return dataset.lengths[index], 17, 12
    labels = sum(label != IGNORE_INDEX for label in sample["labels"])
    return dataset.lengths[index], len(sample.get("pixel_values", ())), labels


def planner_of(model, args: RecipeArguments, dataset: ConversationDataset) -> Planner:
    """Of a run that is about to train."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return Planner(base.config, args, args.world_size, *largest_sample(dataset))


def free_bytes(args: RecipeArguments) -> float:
    """What this run may allocate on the fullest of its GPUs, what it has allocated already included; ranks call it together."""
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return min(gather_object([allocatable_bytes(free) - (OUTSIDE_TORCH if args.world_size > 1 else 0)]))


def settle_memory(model, args: RecipeArguments, dataset: ConversationDataset) -> str | None:
    """Settles --recompute auto, and `args.planned_peak`; what to say of it, None on a CPU. Ranks call it together."""
    if args.device.type != "cuda" or not args.do_train:
        return None
    free, automatic = free_bytes(args), args.recompute == "auto"
    try:
        planner = planner_of(model, args, dataset)
        if automatic:
            args.recompute = least_recomputation(planner, setting_of(args), free)
            args.activation_checkpointing = args.recompute != "none"
        setting = setting_of(args)
        peak = planner.memory(setting).peak
        advised = (
            larger(planner, setting, free) if peak <= free else f"; it may not fit: {advice(planner, setting, free)}"
        )
    except Exception as error:  # a plan is advice: no run ends for it
        args.recompute = "full" if automatic else args.recompute
        return f"not planned ({error!r:.200}); recomputed: {args.recompute}"
    args.planned_peak = peak
    chosen = f"; --recompute auto takes {args.recompute}" if automatic else ""
    return (
        f"{peak / GIB:.1f} GiB planned, {free / GIB:.1f} can be allocated, micro-batches of {setting.micro_batch} x "
        f"{planner.tokens} tokens and {planner.crops} crops{chosen}{advised}"
    )


def least_recomputation(planner: Planner, setting: Setting, free: float) -> str:
    """The first of none, vision and full with which the setting fits into so many bytes; else full."""
    for recompute in RECOMPUTE:
        found = Setting(setting.strategy, setting.deepspeed, recompute, setting.micro_batch)
        if planner.memory(found).peak <= free:
            return recompute
    return "full"


def larger(planner: Planner, setting: Setting, free: float) -> str:
    """What to say of the largest micro-batch that fits as well, a power of two of this one that leaves no place empty."""
    found, share = setting, planner.args.batch_size // planner.gpus
    while (size := 2 * found.micro_batch) <= share and planner.args.batch_size % (size * planner.gpus) == 0:
        next_one = replace(found, micro_batch=size)
        if planner.memory(next_one).peak > free:
            break
        found = next_one
    if found == setting:
        return ""
    return f"; --batch_size_per_gpu {found.micro_batch} fits too ({planner.memory(found).peak / GIB:.1f} GiB) and may be faster"


def advice(planner: Planner, setting: Setting, free: float) -> str:
    """What would fit into so many bytes by the plan, in flags; or that nothing smaller is known."""
    # What has not fitted, though it should have, needs more than planned: the next must be clearly below it.
    limit = min(free, 0.95 * planner.memory(setting).peak)
    for found in smaller(setting):
        peak = planner.memory(found).peak
        if peak <= limit:
            return f"{found.flags()} takes {peak / GIB:.1f} GiB by the plan"
    return "no smaller setting is known to fit; fewer --num_crops, more GPUs or larger ones"


def out_of_memory(error: BaseException, model, args: RecipeArguments, dataset, state: str) -> RunError:
    """One line for a lack of GPU memory in training, with what would have fitted; `state`, what is kept, ends it."""
    first = next((line for line in str(error).splitlines() if line.strip()), "out of memory")
    setting = setting_of(args)
    try:
        planner = planner_of(model, args, dataset)
        planned = (
            f"{planner.memory(setting).peak / GIB:.1f} GiB were planned; {advice(planner, setting, free_bytes_here())}"
        )
    except Exception:  # this error is the one to tell
        planned = "what lowers it most: --batch_size_per_gpu 1, --recompute full, --use_lora"
    return RunError(f"training ran out of GPU memory: {first:.200} {planned}; {state}")


def free_bytes_here() -> float:
    """As `free_bytes`, of this process' GPU alone; without a GPU no limit."""
    if not torch.cuda.is_available():
        return float("inf")
    return allocatable_bytes(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
