"""What a run shows while it trains: one line a log step, above one progress bar where there is a terminal; and its figures."""

import io
import resource
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import PeftModel
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from phi3v.modeling_phi3_v import IGNORE_INDEX

from ..arguments import RecipeArguments
from .flops import matmul_rate, step_flops
from .parts import choices_of

# Without a terminal, seconds between two lines that say how far the answers are.
LINE_INTERVAL = 30
# How a line says the figures of a log step, in this order.
FIGURES = {
    "loss": "loss {:.4g}",
    "learning_rate": "lr {:.3g}",
    "grad_norm": "grad norm {:.3g}",
    "img_per_second": "{:,.2f} img/s",
    "tokens_per_second": "{:,.0f} tokens/s",
    "seconds_per_step": "{:.3f} s/step",
    "peak_memory_gb": "{:.1f} GB",
    "mfu": "MFU {:.1%}",
}
# Figures of the logs that no line repeats: they say nothing beside the others.
UNSAID = ("epoch", "total_flos", "eval_samples_per_second", "eval_steps_per_second", "train_steps_per_second")


class Progress(TrainerCallback):
    """Counts what the run trains, adds the figures to its logs, and shows them; only what this process did itself counts.

    What is counted on the device is read when a step is logged, never in a micro-batch, and summed over the ranks.
    """

    def __init__(self):
        self._bar: tqdm | None = None
        # tokens, squares of the samples' lengths, labels; images and crops.
        self._on_device, self._images, self._crops = torch.zeros(3, dtype=torch.long), 0, 0
        # `_since`: where the time that belongs to no step ended. `_first`: end of the first step, and its number.
        self._seconds, self._since, self._first = 0.0, 0.0, (0.0, 0)
        self._begun_step = self._logged_step = 0
        self._model, self._rate, self._remaining = None, 0.0, 0.0
        self._peak = 0.0  # bytes, the most of a rank in all that was logged

    def count(self, inputs: dict[str, Any]) -> None:
        """Counts a micro-batch; `RecipeTrainer.training_step` calls it.

        Args:
            inputs (dict): a batch of `DataCollatorForPhi3V`; without an attention mask every place holds a token.
        """
        if not inputs["ids"]:
            # Padding alone: a place without a sample.
            return
        labels = inputs["labels"]  # (B, N)
        if "cu_seq_lens_q" in inputs:
            lengths = inputs["cu_seq_lens_q"].diff().long()
        elif "attention_mask" in inputs:
            lengths = inputs["attention_mask"].sum(1)
        else:
            lengths = labels.new_full((len(labels),), labels.shape[1])
        found = torch.stack([lengths.sum(), lengths.square().sum(), (labels[:, 1:] != IGNORE_INDEX).sum()])
        self._on_device += found.to(self._on_device.device, non_blocking=True)
        self._images += len(inputs.get("image_sizes", ()))
        self._crops += len(inputs.get("pixel_values", ()))

    def pop_figures(self, args: RecipeArguments, state) -> dict[str, float]:
        """Figures of the steps since the last log, of all ranks, which call it together; begins anew.

        Returns:
            dict: img_per_second (without, if there is no image) and tokens_per_second over all ranks, seconds_per_step,
            peak_memory_gb (10^9 bytes; the most of a rank: torch's allocations on a GPU, else the resident memory of the
            process), on a GPU mfu. Evaluations and checkpoints do not count as time of a step.
        """
        counts = torch.tensor([self._images, self._crops], device=args.device)
        counts = torch.cat([counts, self._on_device.to(args.device)])
        peak = torch.tensor(_peak_memory(args.device))
        if dist.is_initialized():
            peak = peak.to(args.device)
            dist.all_reduce(counts)
            dist.all_reduce(peak, dist.ReduceOp.MAX)
        self._peak = peak.item()
        images, crops, tokens, squares, labels = counts.tolist()
        now = time.perf_counter()
        steps, seconds = max(1, state.global_step - self._logged_step), self._seconds + now - self._since
        left, (first_end, first_step) = state.max_steps - state.global_step, self._first
        # Evaluations and checkpoints are still to come, too; the first step, which warms up, is not.
        later = (now - first_end) / (state.global_step - first_step) if state.global_step > first_step else 0
        self._remaining = left * (later or seconds / steps)
        self._on_device.zero_()
        self._images, self._crops, self._seconds, self._since = 0, 0, 0.0, now
        self._logged_step = state.global_step
        figures = {"img_per_second": images / seconds} if images else {}
        figures |= {"tokens_per_second": tokens / seconds, "seconds_per_step": seconds / steps}
        figures |= {"peak_memory_gb": self._peak / 1e9}
        if self._rate:
            choices = choices_of(args)
            flops = step_flops(self._model.config, tokens, squares, crops, labels, choices, args.lora_rank)
            figures["mfu"] = flops["step"] / seconds / (self._rate * args.world_size)
        # As many digits as a person or a tracker reads.
        return {name: float(f"{value:.5g}") for name, value in figures.items()}

    def on_train_begin(self, args, state, control, model, **kwargs):
        self._model = model.get_base_model() if isinstance(model, PeftModel) else model
        self._on_device = torch.zeros(3, dtype=torch.long, device=args.device)
        self._images = self._crops = 0
        if args.device.type == "cuda":
            self._rate = matmul_rate("cuda", args.compute_dtype)
            # What came before, such as the answers before training, is not training's.
            torch.cuda.reset_peak_memory_stats()
        self._begun_step = self._logged_step = state.global_step
        self._seconds, self._since = 0.0, time.perf_counter()
        self._first = (self._since, state.max_steps)
        if shows_bar(args):
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + now - self._since, now
        if state.global_step == self._begun_step + 1:
            self._first = now, state.global_step
        if state.global_step >= state.max_steps and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True
        if self._bar:
            self._bar.update(state.global_step - self._bar.n)

    def on_epoch_end(self, args, state, control, **kwargs):
        # Of a run that ends before its time; what is logged already is not logged again.
        if control.should_training_stop and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True

    def on_train_end(self, args, state, control, **kwargs):
        if args.planned_peak and self._peak and state.is_world_process_zero:
            planned = f"peak memory: {args.planned_peak / 2**30:.1f} GiB planned, {self._peak / 2**30:.1f} GiB measured"
            print(f"{planned} ({self._peak / args.planned_peak - 1:+.1%})", flush=True)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self._bar:
            self._bar.set_postfix_str("evaluating")

    def on_evaluate(self, args, state, control, **kwargs):
        self._since = time.perf_counter()
        if self._bar:
            self._bar.set_postfix_str("")

    def on_save(self, args, state, control, **kwargs):
        self._since = time.perf_counter()

    def on_log(self, args, state, control, logs, **kwargs):
        if not state.is_world_process_zero:
            return
        line = log_line(logs, state.global_step, state.max_steps, self._begun_step, self._remaining)
        if not line:
            return
        if self._bar:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Ends the progress bar; `RecipeTrainer.train` calls it, however training ended."""
        if self._bar:
            self._bar.close()
        self._bar = None


def log_line(logs: dict[str, Any], step: int, steps: int, begun_step: int = 0, remaining: float = 0) -> str:
    """What the Trainer logs as a line for people; details, which have a slash in their names, are left out.

    Args:
        logs (dict): figures of a log step, an evaluation, or of the whole training.
        step (int): optimizer step; `steps`, that of the end; `begun_step`, the one from which a resumed run went on.
        remaining (float): seconds that training still takes.
    """
    logs = {name: value for name, value in logs.items() if name not in UNSAID and "/" not in name}
    if not logs:
        return ""
    if "train_runtime" in logs:
        found = [f"trained {step - begun_step} steps in {_duration(logs.pop('train_runtime'))}"]
        names = {"train_loss": "mean loss {:.4g}", "train_samples_per_second": "{:,.2f} samples/s"}
        found += [text.format(logs.pop(name)) for name, text in names.items() if name in logs]
        return " | ".join([*found, *_plain(logs)])
    place = f"step {step} of {steps}"
    if any(name.startswith("eval_") for name in logs):
        seconds = logs.pop("eval_runtime", None)
        figures = _plain({name.removeprefix("eval_"): value for name, value in logs.items()})
        return f"{place} | evaluation: {', '.join(figures)}" + ("" if seconds is None else f" | {_duration(seconds)}")
    figures = [text.format(logs.pop(name)) for name, text in FIGURES.items() if logs.get(name) is not None]
    left = [f"{_duration(remaining)} left"] if figures else []
    return " | ".join([place, *figures, *_plain(logs), *left])


def _plain(figures: dict[str, Any]) -> list[str]:
    return [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()]


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shows_bar(args: RecipeArguments) -> bool:
    """Whether this process draws progress bars: the first rank, at a terminal, without --no-tqdm."""
    return args.process_index == 0 and not args.disable_tqdm and sys.stderr.isatty()


class _Lines(io.TextIOBase):
    """A file that takes what tqdm draws, and prints each state as a line of its own."""

    def write(self, text: str) -> int:
        if text.strip():
            print(text.strip(), flush=True)
        return len(text)


def answers_bar(total: int, initial: int, description: str, disable: bool = False) -> tqdm:
    """Shows how many of `total` answers there are: a bar at a terminal, else a line now and then; the first rank alone.

    Args:
        total, initial (int): answers in all, and those that are there already.
        description (str): stands before them.
        disable (bool): no bar, as with --no-tqdm: lines only.
    """
    first = PartialState().is_main_process
    if first and not disable and sys.stderr.isatty():
        # Within training it makes room for that bar.
        return tqdm(total=total, initial=initial, desc=description, unit="answer", leave=None, dynamic_ncols=True)
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        disable=not first,
        file=_Lines(),
        leave=False,
        mininterval=LINE_INTERVAL,
        delay=LINE_INTERVAL,
        miniters=1,
        bar_format="{desc}: {n_fmt} of {total_fmt}, {elapsed} passed, about {remaining} left",
    )
