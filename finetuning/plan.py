"""Says before anyone pays for a GPU whether a run fits, how fast it may be and what it costs.

    python -m finetuning.plan --gpus 8 --gpu_memory 80
    python -m finetuning.plan --gpus 2 --gpu_memory 24 --use_lora --data_dir DATA_DIR --num_train_epochs 3
    python -m finetuning.plan --gpus 1 --gpu H100 --dollars_per_gpu_hour 2.5 --json

Takes the flags of a training script besides its own; needs no GPU, no weights and no network. The sample is a Letter page of
2,529 tokens and 17 crops, or --tokens and --crops, or the largest and the mean one of --data_dir.

A GPU that is sold as 80 GB has 80 GiB (2^30 bytes). Of them the driver keeps 1%, CUDA and NCCL about 1 GiB, and 3% are left for
fragments: what fits is at most what remains. Cards that keep error-correcting codes in GDDR (A10G, L4, L40S) have 6% less: give
what nvidia-smi says. Memory is exact to a few percent of what torch allocates (docs/hardware.md). Hours are an estimate that no GPU has
confirmed: FLOPs at 75% of the card's dense 16-bit peak, then bytes at 80% of its bandwidth, and what goes between GPUs.

Exit status: 0, or 2 for a bad call.
"""

import argparse
import difflib
import json
import math
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from phi3v import Phi3VConfig

from .arguments import RecipeArguments, _Parser, changed_flags, read_deepspeed
from .command_line import CommandParser
from .errors import InputError
from .training.fitting import RECOMPUTE, Planner, Setting, deepspeed_configs, setting_of, smaller
from .training.memory import GIB, Memory, main_memory, usable_bytes, zero_of
from .training.parts import STRATEGIES
from .training.speed import CARDS, step_seconds, usual_card

STRATEGY_FLAGS = ("freeze_vision_model", "use_lora", "use_qlora", "vision", "projector", "language")
# Flags that a setting or the card decides on.
DECIDED = {*STRATEGY_FLAGS, "deepspeed", "recompute", "batch_size_per_gpu", "hub_token"}
DECIDED |= {"bf16", "fp16", "use_flash_attention", "attn_implementation"}


@dataclass(frozen=True)
class Samples:
    """What is trained on: rows; the largest sample's tokens, crops and labels; the mean sample's; whether it is the user's."""

    rows: int | None
    tokens: int
    crops: int
    labels: int
    mean_tokens: float
    mean_squares: float
    mean_crops: float
    name: str


@dataclass(frozen=True)
class Row:
    """A setting, what it takes of a GPU, and whether that fits."""

    setting: Setting
    memory: Memory
    fits: bool

    def as_json(self, gpus: int) -> dict[str, Any]:
        found = self.setting
        return {
            "strategy": found.strategy,
            "deepspeed": found.deepspeed,
            "gpus": gpus,
            "recompute": found.recompute,
            "micro_batch": found.micro_batch,
            "peak_gib": round(self.memory.peak / GIB, 2),
            "fits": self.fits,
        }


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, RecipeArguments]:
    """The planner's own flags, and the run's as on GPUs that are not here.

    Raises:
        InputError: for a flag that neither knows, or a value out of range.
    """
    usage = "%(prog)s --gpus N --gpu_memory GB [flags of a training script]"
    parser = CommandParser("plan", __doc__, usage=usage)
    add = parser.add_argument
    add("--gpus", type=int, help="GPUs of all machines together (default: those that are here, else 1)")
    add(
        "--gpu_memory",
        type=float,
        metavar="GB",
        help="of each GPU, as it is sold (default: of those here, or of --gpu)",
    )
    add(
        "--gpu",
        metavar="NAME",
        help=f"the card, for its speed: {', '.join(CARDS)} (default: the usual one of that memory)",
    )
    add("--task", help="rows of --data_dir in a task's own form, as `python -m finetuning.validate --task` takes them")
    add("--tokens", type=int, help="of a typical sample (2529)")
    add("--crops", type=int, help="of a typical sample's images, global views included (17)")
    add("--rows", type=int, help="samples of an epoch, where there is no --data_dir (1000)")
    add("--dollars_per_gpu_hour", type=float, metavar="N", help="price of a GPU and hour; prints what the run costs")
    add("--json", action="store_true", help="print all rows as a JSON list")
    own, flags = parser.parse_known_args(argv)
    least = {"gpus": 1, "tokens": 2, "crops": 0, "rows": 1}
    for name, value in {**least, "gpu_memory": 1, "dollars_per_gpu_hour": 0}.items():
        given = getattr(own, name)
        if given is not None and not value <= given < math.inf:
            raise InputError(f"--{name} {given:g}: expected a number of at least {value}")
    if own.gpu is not None and own.gpu not in CARDS:
        raise InputError(f"--gpu {own.gpu}: expected one of {', '.join(CARDS)}; --gpu_memory alone takes any size")
    names = [option for action in parser._actions for option in action.option_strings]
    for word in (flag.split("=")[0] for flag in flags if flag.startswith("--")):
        if close := difflib.get_close_matches(word, names, n=1, cutoff=0.85):
            raise InputError(f"unrecognized arguments: {word}; did you mean {close[0]}?")
    return own, run_arguments(flags)


def run_arguments(flags: list[str]) -> RecipeArguments:
    """A training script's flags, checked, without what looks at this machine: its GPUs, trackers and folders."""
    kinds: Any = RecipeArguments
    parser = _Parser(kinds, allow_abbrev=False, add_help=False)
    found = parser.parse_flags(flags)
    changed = changed_flags(found)
    engine, flash = found.deepspeed, found.use_flash_attention or found.attn_implementation == "flash_attention_2"
    half = found.fp16 is not False or found.bf16
    found.use_cpu, found.deepspeed, found.fp16, found.bf16 = True, "none", None, half
    found.report_to, found.push_to_hub, found.resume_from_checkpoint = None, False, None
    found.gradient_accumulation_steps, found.overwrite_output_dir = None, False
    found.output_dir = tempfile.gettempdir()
    if flash:
        # It takes as much memory as PyTorch's own.
        found.use_flash_attention, found.attn_implementation = False, None
    recompute, given = found.recompute, found.model_name_or_path
    if not os.path.isdir(given):
        found.model_name_or_path = "official/sizes"
    args = RecipeArguments(**vars(found))
    args.model_name_or_path, args.recompute, args.use_flash_attention, args.changed = given, recompute, flash, changed
    args.deepspeed, args.deepspeed_config = read_deepspeed(engine, args.use_lora, args.use_qlora)
    return args


def gpus_of(own: argparse.Namespace) -> tuple[int, float, str]:
    """Number of GPUs, GB of each as sold, and the card's name; by default of those here.

    Raises:
        InputError: where there is none and none is described.
    """
    count, memory = own.gpus, own.gpu_memory
    if memory is None and own.gpu is not None:
        memory = CARDS[own.gpu].memory
    if torch.cuda.is_available():
        count = count or torch.cuda.device_count()
        memory = memory or math.ceil(torch.cuda.get_device_properties(0).total_memory / GIB)
    if memory is None:
        raise InputError("no GPU is here: expected --gpu_memory GB (and --gpus N), or --gpu NAME, of those to plan for")
    return count or 1, memory, own.gpu or usual_card(memory)


def model_config(name: str) -> Phi3VConfig:
    """The sizes of a model folder; of any other name the official ones."""
    return Phi3VConfig.from_pretrained(name, trust_remote_code=False) if os.path.isdir(name) else Phi3VConfig()


def samples_of(own: argparse.Namespace, args: RecipeArguments) -> Samples:
    """The rows of --data_dir, their images by header alone; or a typical sample.

    Raises:
        InputError: for a row that cannot be read.
    """
    if args.data_dir is None:
        tokens, crops = own.tokens or 2529, 17 if own.crops is None else own.crops
        name = "a Letter page" if (tokens, crops) == (2529, 17) else "as given"
        return Samples(own.rows, tokens, crops, 12, tokens, tokens**2, crops, name)
    # Here, because it takes a second.
    from .task_script import OWN_DATA, load_script
    from .validate import check_folder, load_processor

    script = load_script(own.task) if own.task not in (None, OWN_DATA) else None
    processor, remarks = load_processor(args.model_name_or_path, args.num_crops)
    print(*(f"remark: {remark}" for remark in remarks), sep="\n", end="\n" * bool(remarks), file=sys.stderr)
    to_conversation = getattr(script, "to_conversation", None)
    faults, _, splits = check_folder(Path(args.data_dir), processor, "headers", None, False, to_conversation, None)
    faults = [fault for fault in faults if "expected images that train does not hold" not in str(fault)]
    if faults or "train" not in splits:
        raise InputError(
            str(faults[0]) if faults else f"--data_dir {args.data_dir}: expected a split train, found none"
        )
    found = splits["train"]
    rows = len(found.tokens)
    squares = sum(length**2 for length in found.tokens) / rows
    texts = [length - images for length, images in zip(found.tokens, found.image_tokens, strict=True)]
    return Samples(
        rows,
        max(found.tokens),
        max(found.crops),
        # Of a text every token may be one to learn.
        max(12, max(texts) // 2),
        sum(found.tokens) / rows,
        squares,
        sum(found.crops) / rows,
        str(args.data_dir),
    )


def plan_rows(planner: Planner, own_setting: Setting, usable: float) -> list[Row]:
    """Every strategy with every DeepSpeed config, recomputation and micro-batch that can be run."""
    rows = []
    sizes = sorted({1, 2, 4, 8, own_setting.micro_batch})
    engines = [*deepspeed_configs()]
    if own_setting.deepspeed not in engines:
        engines.append(own_setting.deepspeed)
    strategies = dict.fromkeys([*STRATEGIES, own_setting.strategy])
    for strategy, engine, recompute, size in product(strategies, engines, RECOMPUTE[::-1], sizes):
        setting = Setting(strategy, engine, recompute, size)
        # bitsandbytes' weights cannot be split over the GPUs.
        if "qlora" in strategy and zero_of(planner.arguments(setting)).get("stage") == 3:
            continue
        memory = planner.memory(setting)
        rows.append(Row(setting, memory, memory.peak <= usable))
    return rows


def recommend(rows: list[Row], own: Setting, changed: dict[str, Any], seconds) -> Row | None:
    """The fastest way of the best strategy that fits, with the DeepSpeed config that shares least among the GPUs.

    Args:
        rows (list[Row]): all.
        own (Setting): of the run.
        changed (dict): its flags. A strategy that they name is kept to, offloaded if need be, and so is a DeepSpeed config;
            else full, lora and qlora are tried, in this order, nothing offloaded.
        seconds (Callable): Setting -> seconds of a step.
    """
    chosen = any(name in changed for name in STRATEGY_FLAGS)
    found = [row for row in rows if row.fits]
    for strategy in [own.strategy] if chosen else ["full", "lora", "qlora"]:
        # 16-bit weights without a float32 copy lose small updates: full fine-tuning goes with DeepSpeed.
        engines = ["none"] if "lora" in strategy else ["zero2", "zero3"]
        if chosen:
            engines += ["zero2_offload", "zero3_offload"]
        for engine in [own.deepspeed] if "deepspeed" in changed else engines:
            fitting = [row for row in found if (row.setting.strategy, row.setting.deepspeed) == (strategy, engine)]
            if fitting:
                return min(fitting, key=lambda row: seconds(row.setting))
    return None


def format_table(rows: list[Row], usable: float) -> str:
    """Peak GiB by strategy and DeepSpeed, recomputation and micro-batch; what does not fit stands in brackets."""
    sizes = sorted({row.setting.micro_batch for row in rows})
    columns = list(product(RECOMPUTE[::-1], sizes))
    head = "".join(f"  {'recompute ' + name:<{8 * len(sizes) - 2}}" for name in RECOMPUTE[::-1])
    width = 1 + max(6, *(len(row.setting.strategy) for row in rows))
    lines = [
        f"peak GiB of each GPU; (n): over the {usable / GIB:.1f} that can be allocated",
        f"{'micro-batch':<{width + 14}}{head}",
    ]
    lines.append(f"{'':<{width + 14}}" + "".join(f"{size:>8}" for _, size in columns))
    by = {
        (row.setting.strategy, row.setting.deepspeed, row.setting.recompute, row.setting.micro_batch): row
        for row in rows
    }
    for strategy, engine in dict.fromkeys((row.setting.strategy, row.setting.deepspeed) for row in rows):
        cells = ""
        for column in columns:
            row = by[strategy, engine, *column]
            figure = f"{row.memory.peak / GIB:.1f}"
            cells += f"{figure if row.fits else f'({figure})':>8}"
        name = engine if engine in deepspeed_configs() else "your own"
        lines.append(f"{strategy:<{width}}{name:<14}{cells}")
    return "\n".join(lines)


def command(args: RecipeArguments, setting: Setting, gpus: int, bf16: bool, task: str | None) -> str:
    """The command of a setting, with the flags of `args` that no setting decides on."""
    script = task if task and task.endswith(".py") else f"finetune_hf_trainer_{task or 'docvqa'}.py"
    words = [f"torchrun --nproc_per_node={gpus} {script}"]
    words += ["--bf16 --use_flash_attention"] * bf16 + [setting.flags()]
    for name, value in args.changed.items():
        if name not in DECIDED:
            words += [f"--{name}", *([] if value is True else [shlex.quote(_as_word(value))])]
    return " ".join(words)


def _as_word(value: Any) -> str:
    """A flag's value as the command line has it."""
    return json.dumps(value) if isinstance(value, dict) else str(getattr(value, "value", value))


def describe_memory(memory: Memory) -> str:
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in vars(memory).items())
    return f"{memory.peak / GIB:.1f} GiB ({parts})"


def describe_time(args: RecipeArguments, samples: Samples, seconds: float, gpus: int, dollars: float | None) -> str:
    """Steps, hours and price of the run."""
    rows = samples.rows or 1000
    steps = (
        args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * math.ceil(rows / args.batch_size))
    )
    hours = steps * seconds / 3600
    text = f"{steps} steps of {args.batch_size} ({rows:,} samples), {seconds:.1f} s each: {hours:.2f} hours"
    text += f", {args.batch_size / seconds:.1f} samples/s"
    if dollars is not None:
        text += f", {hours * gpus * dollars:,.2f} dollars"
    return text + " (estimated, answering and start not included)"


def next_smaller(planner: Planner, row: Row) -> str:
    """What to take when the recommended setting turns out not to fit after all."""
    for setting in smaller(row.setting):
        peak = planner.memory(setting).peak
        if peak < 0.95 * row.memory.peak:
            return f"{setting.flags()} ({peak / GIB:.1f} GiB)"
    return "nothing: a smaller --num_crops makes smaller samples"


@dataclass(frozen=True)
class Plan:
    """What the planner has found: all rows, the run's own, and the recommended one, if any fits."""

    planner: Planner
    samples: Samples
    card: str
    memory: float
    usable: float
    rows: list[Row]
    mine: Row
    best: Row | None

    def seconds(self, setting: Setting) -> float:
        """Of an optimizer step."""
        mean = self.samples.mean_tokens, self.samples.mean_squares, self.samples.mean_crops
        return step_seconds(self.planner, setting, CARDS[self.card], self.planner.args.batch_size, *mean)


def make_plan(own: argparse.Namespace, args: RecipeArguments) -> Plan:
    """Plans what `parse_args` has read."""
    count, memory, card = gpus_of(own)
    usable, samples = usable_bytes(memory), samples_of(own, args)
    config = model_config(args.model_name_or_path)
    planner = Planner(config, args, count, samples.tokens, samples.crops, samples.labels)
    automatic = args.recompute == "auto"
    setting = setting_of(args, "full" if automatic else None)
    rows = plan_rows(planner, setting, usable)
    # From the most to the least that is computed again, as the rows are.
    same = [row for row in rows if replace(row.setting, recompute="") == replace(setting, recompute="")]
    fitting = [row for row in same if row.fits]
    mine = (fitting or same)[-1 if fitting else 0] if automatic else next(r for r in same if r.setting == setting)
    found = Plan(planner, samples, card, memory, usable, rows, mine, None)
    return replace(found, best=recommend(rows, setting, args.changed, found.seconds))


def report(plan: Plan, dollars: float | None, task: str | None) -> str:
    """What the command prints."""
    samples, planner, best, args = plan.samples, plan.planner, plan.best, plan.planner.args
    mean = f"; on average {samples.mean_tokens:,.0f} and {samples.mean_crops:.1f}" if args.data_dir else ""
    lines = [
        f"sample       {samples.tokens:,} tokens, {samples.crops} crops ({samples.name}){mean}",
        f"GPUs         {planner.gpus} x {plan.memory:g} GB, speed as of {plan.card}; {plan.usable / GIB:.1f} GiB of each can be allocated",
        "",
        format_table(plan.rows, plan.usable),
        "",
        f"your flags   {plan.mine.setting.flags()}: {describe_memory(plan.mine.memory)}: {'fits' if plan.mine.fits else 'does not fit'}",
    ]
    if best is None:
        lines.append("recommended  nothing fits: more GPUs, larger ones, or a smaller --num_crops")
    else:
        bf16 = CARDS[plan.card].bf16
        lines += [
            f"recommended  {command(args, best.setting, planner.gpus, bf16, task)}",
            f"memory       {describe_memory(best.memory)}",
            f"time         {describe_time(args, samples, plan.seconds(best.setting), planner.gpus, dollars)}",
            f"if it fails  {next_smaller(planner, best)}",
        ]
    return "\n".join(lines + other_ways(planner, plan.rows, best))


def other_ways(planner: Planner, rows: list[Row], best: Row | None) -> list[str]:
    """How to fine-tune fully, where that only fits with states in main memory."""
    if best is not None and best.setting.strategy == "full":
        return []
    full = [row for row in rows if row.fits and row.setting.strategy == "full" and "offload" in row.setting.deepspeed]
    if not full:
        return []
    row = min(full, key=lambda row: (RECOMPUTE.index(row.setting.recompute), row.setting.deepspeed))
    needed = main_memory(planner.arguments(row.setting), planner.activations(row.setting).parameters)
    return [
        f"full, slower {row.setting.flags()}: {row.memory.peak / GIB:.1f} GiB, and {needed / GIB:.0f} GiB of main memory"
    ]


def main(argv: list[str] | None = None) -> int:
    """Prints the plan of what the command line says; exit status 2 for a bad call."""
    try:
        own, args = parse_args(argv)
        plan = make_plan(own, args)
        rows = [row.as_json(plan.planner.gpus) for row in plan.rows]
        print(json.dumps(rows) if own.json else report(plan, own.dollars_per_gpu_hour, own.task))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
