"""The Hugging Face Trainer, with checkpoints that are whole or not there, stops that lose nothing, and balanced micro-batches."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count, islice
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from ..errors import RunError, Stopped
from .callbacks import keep_text_activations
from .checkpoint import SAVING, SETTINGS, find_checkpoints
from .signals import stop_signals

NONFINITE_IN_A_ROW = 10


class RecipeTrainer(Trainer):
    """A Trainer for `RecipeArguments`: batches of `DataCollatorForPhi3V`, whose `ids` name samples in messages."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._saving, self._saved_step = False, None
        self._ids, self._losses, self._nonfinite = [], [], 0
        stop_signals.install()

    # ---- micro-batches

    def get_train_dataloader(self):
        loader, dataset = super().get_train_dataloader(), self.train_dataset
        micro_batch, batch_size = self._train_batch_size, self.get_total_train_batch_size(self.args)
        ranks = batch_size // micro_batch // self.args.gradient_accumulation_steps
        random_order = self.args.train_sampling_strategy == "random"
        if getattr(dataset, "lengths", None) and random_order and micro_batch * ranks > 1:
            # Around the sampler that accelerate has seeded. One of `_get_train_sampler`'s it would not seed, nor would `set_epoch`
            # reach it where a resumed epoch begins in its middle.
            loader.set_sampler(
                BalancedSampler(
                    loader.get_sampler(), dataset.length, batch_size, micro_batch, ranks, self.args.padding_free
                )
            )
        return loader

    # ---- checkpoints: written aside, synced, renamed

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, SAVING) if self._saving else folder

    def _save_checkpoint(self, model, trial):
        if self.state.global_step == self._saved_step:
            return
        output = Path(self.args.output_dir)
        aside, name = output / SAVING, f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._complete(aside / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
            free = shutil.disk_usage(output).free / 1e9
            raise RunError(
                f"{output / name} could not be written: {reason} ({free:.3f} GB are free there); {self._last_checkpoint()}"
            ) from error
        finally:
            self._saving, self.args.save_total_limit = False, limit
        if self.args.should_save:
            shutil.rmtree(output / name, ignore_errors=True)
            (aside / name).rename(output / name)
            _sync(output)
            shutil.rmtree(aside, ignore_errors=True)
            rotate_checkpoints(str(output), limit, self.state.best_model_checkpoint)
        self._saved_step = self.state.global_step
        self.accelerator.wait_for_everyone()

    def _complete(self, folder: Path):
        """Adds the run's settings, corrects what the Trainer has noted of the place, and writes all through to the disk."""
        if self.state.best_global_step:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(folder / "trainer_state.json"))
        settings = Path(self.args.output_dir) / SETTINGS
        if settings.exists():
            shutil.copy(settings, folder / SETTINGS)
        for path in folder.rglob("*"):
            _sync(path)
        _sync(folder)

    def _last_checkpoint(self) -> str:
        found = find_checkpoints(Path(self.args.output_dir))
        return (
            f"the last good checkpoint is {found[0]}, the same command goes on from it"
            if found
            else "there is no checkpoint yet"
        )

    # The sum of losses since the last log belongs to the state: without it the first loss that a resumed run logs would be
    # another one. Saved and loaded with the random numbers, which are each rank's own, too.

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        pending = [self._tr_loss.item(), self._globalstep_last_logged]
        (Path(output_dir) / f"loss_{self.args.process_index}.json").write_text(json.dumps(pending))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        path = Path(checkpoint) / f"loss_{self.args.process_index}.json"
        if path.exists():
            loss, self._globalstep_last_logged = json.loads(path.read_text())
            self._tr_loss += loss

    # ---- stops

    def _run_epoch(self, **kwargs):
        # Resumed at its last step, the Trainer would train one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        signum = stop_signals.agree(self.args.device)
        self.control.should_save |= bool(signum)
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if signum:
            raise Stopped(signum, f"checkpoint-{self.state.global_step} is written to {self.args.output_dir}")

    # ---- losses and gradients that are not finite

    def _prepare_inputs(self, inputs):
        inputs = dict(inputs)
        self._ids = inputs.pop("ids", [])
        return super()._prepare_inputs(inputs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append((self._ids, loss))
        return loss.nan_to_num(0, 0, 0)

    def _prepare_for_training(self, *args, **kwargs):
        if self.args.recompute == "vision":
            keep_text_activations(self.model)
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_deepspeed_enabled:
            # So that it leaves such a step out in float32 too.
            self.optimizer.optimizer.check_grad_overflow = True
        return prepared

    def _get_grad_norm(self, model, grad_norm=None):
        """Called before the optimizer's step; DeepSpeed's step is done by then, or was left out."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        losses, self._losses = self._losses, []
        if self.is_deepspeed_enabled:
            finite = not self.optimizer.step_was_skipped
        else:
            finite = bool(torch.as_tensor(grad_norm).isfinite())
        if finite:
            self._nonfinite = 0
            return grad_norm
        bad = gather_object([name for ids, loss in losses if not loss.isfinite() for name in ids])
        if self.args.fp16 and not bad:
            # Loss scaling finds its scale so.
            return grad_norm
        self._nonfinite += 1
        names = bad or gather_object([name for ids, _ in losses for name in ids])
        what = "loss" if bad else "gradient"
        message = f"step {self.state.global_step + 1}: the {what} of {', '.join(names)} is not finite"
        if self.args.on_nonfinite == "stop" or self._nonfinite >= NONFINITE_IN_A_ROW:
            raise RunError(
                f"{message}; {self._last_checkpoint()}. A lower --learning_rate or --bf16 may help; --on_nonfinite skip leaves "
                f"such steps out (up to {NONFINITE_IN_A_ROW} in a row)"
            )
        if self.args.process_index == 0:
            print(f"skipped: {message}", flush=True)
        if not self.is_deepspeed_enabled:
            for parameter in model.parameters():
                parameter.grad = None
        return grad_norm


class BalancedSampler(torch.utils.data.Sampler):
    """The order of another sampler, its samples arranged by length within each optimizer step.

    The ranks wait for each other, so micro-batches that are run at the same time should cost the same. Padded, samples of like
    length share a micro-batch, so that little is padded. Padding-free, micro-batches get like sums of lengths, which bounds
    the memory too. The loss is normalised over the step: another arrangement of its samples changes nothing but rounding.

    Args:
        sampler (Sampler): settles which samples form a step.
        length (Callable): index of a sample -> its length in tokens, in the epoch that runs.
        batch_size (int): samples of an optimizer step, ranks x micro-batch x accumulation.
        micro_batch (int): samples at once on each rank.
        ranks (int): processes to which the micro-batches are dealt in turns.
        padding_free (bool): a micro-batch costs the sum of its lengths, not its longest length for each sample.
    """

    def __init__(
        self, sampler, length: Callable[[int], int], batch_size: int, micro_batch: int, ranks: int, padding_free: bool
    ):
        self.sampler, self.length, self.batch_size = sampler, length, batch_size
        self.micro_batch, self.ranks, self.padding_free = micro_batch, ranks, padding_free

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        order = iter(self.sampler)
        for step in count():
            samples = list(islice(order, self.batch_size))
            if len(samples) < self.batch_size:
                yield from samples
                return
            samples.sort(key=self.length, reverse=True)
            groups = self._balance(samples) if self.padding_free else cut(samples, self.micro_batch)
            for number, dealt in enumerate(cut(groups, self.ranks)):
                # Turned from step to step: else the workers of one rank would prepare the longest samples of every step. Every
                # other time from behind, so that the ranks' sums are alike too: without DeepSpeed they wait once a step.
                dealt = dealt[:: -1 if number % 2 else 1]
                turn = step % self.ranks
                for group in dealt[turn:] + dealt[:turn]:
                    yield from group

    def _balance(self, samples: list[int]) -> list[list[int]]:
        """Micro-batches of like sums, the largest first: each sample, longest first, joins the smallest that is not full."""
        smallest, full = [(0, number, []) for number in range(len(samples) // self.micro_batch)], []
        for sample in samples:
            total, number, group = heappop(smallest)
            group.append(sample)
            grown = (total + self.length(sample), number, group)
            if len(group) < self.micro_batch:
                heappush(smallest, grown)
            else:
                full.append(grown)
        return [group for _, _, group in sorted(full, reverse=True)]


def cut(items: list, size: int) -> list[list]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
