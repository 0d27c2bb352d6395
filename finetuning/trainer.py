"""The Hugging Face Trainer, with checkpoints that are whole or not there, and stops that lose nothing."""

import json
import os
import shutil
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from .checkpoint import SAVING, SETTINGS, find_checkpoints
from .errors import RunError, Stopped
from .signals import stop_signals

NONFINITE_IN_A_ROW = 10


class RecipeTrainer(Trainer):
    """A Trainer for `RecipeArguments`: batches of `DataCollatorForPhi3V`, whose `ids` name samples in messages."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._saving, self._saved_step = False, None
        self._ids, self._losses, self._nonfinite = [], [], 0
        stop_signals.install()

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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
