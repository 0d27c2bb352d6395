"""The Hugging Face Trainer for these recipes: its public hooks, and one private method."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerState
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import TrainOutput

from ..arguments import RecipeArguments
from ..data.dataset import StartEpoch
from ..data.mixture import MixtureSampler
from ..data.sampler import StepSampler
from ..errors import RunError
from .callbacks import (
    GradientCheck,
    NonFiniteCheck,
    PendingLoss,
    PrepareTraining,
    SealCheckpoint,
    StopOnSignal,
    last_checkpoint,
)
from .checkpoint import final_files, seal
from .fitting import out_of_memory
from .identity import read_run
from .progress import Progress
from .rates import group_by_rate, lora_plus_optimizer, rates_of
from .signals import spare_workers
from .source_losses import SourceLosses
from .trackers import log_answers, write_beside_the_run
from .upload import UploadCheckpoint
from .weights import load_weights, whole_weights

# Parameters of one group of a bitsandbytes optimizer. Its kernels count the elements of a tensor in 32 bits, and DeepSpeed makes
# one tensor of a group: 4.1e9 elements with full fine-tuning on one GPU.
LARGEST_GROUP = 500_000_000


class RecipeTrainer(Trainer):
    """A Trainer for `RecipeArguments`, `ConversationDataset` and batches of `DataCollatorForPhi3V`.

    Over the Trainer's own behaviour: every row once an epoch, checkpoints and final weights that are sealed, stops on
    signals that lose nothing, no step that is not finite, a finished run that is not trained again, one line a log
    step, and the task's score while it trains.

    Args:
        model: as `load_model` gives it.
        args (RecipeArguments): of the run.
        eval_dataset (ConversationDataset, optional): the rows to answer; a sample of them is, while training.
        callbacks (Sequence): more of them.
        score_answers (Callable, optional): what `score_while_training` gives.
        **kwargs: the Trainer's own.
    """

    args: RecipeArguments

    def __init__(self, model, args, eval_dataset=None, callbacks=(), score_answers=None, **kwargs):
        self._score_answers = score_answers
        if eval_dataset is not None:
            eval_dataset = eval_dataset.sample(args.eval_rows_during_training)
        if args.early_stopping_patience is not None:
            callbacks = [*callbacks, EarlyStoppingCallback(args.early_stopping_patience)]
        self._nonfinite, self._pending, self._saved_step = NonFiniteCheck(), PendingLoss(), None
        self._progress, self._source_losses = Progress(), SourceLosses()
        # Where the weights come from, if there was nothing left to train.
        self._trained_weights: Path | None = None
        # A signal stops the run once the checkpoint is sealed, so it comes last.
        own = [StartEpoch(), PrepareTraining(), GradientCheck(model), self._nonfinite, self._pending, SealCheckpoint()]
        if args.upload_to:
            own.append(UploadCheckpoint())
        callbacks = [*own, *callbacks, self._progress, StopOnSignal()]
        super().__init__(model=model, args=args, eval_dataset=eval_dataset, callbacks=callbacks, **kwargs)
        for printed in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(printed)
        write_beside_the_run(self.callback_handler.callbacks, args)
        # The model smooths by itself: transformers' smoother shifts the labels of models that it knows by name only.
        self.label_smoother = None

    def get_train_dataloader(self):
        loader, args, mixture = super().get_train_dataloader(), self.args, self.train_dataset.mixture
        seed = args.seed if args.data_seed is None else args.data_seed
        # Around the sampler that accelerate has seeded. One of `_get_train_sampler`'s it would not seed, nor would
        # `set_epoch` reach it where a resumed epoch begins in its middle.
        loader.set_sampler(
            StepSampler(
                loader.get_sampler() if mixture is None else MixtureSampler(mixture, seed),
                self.train_dataset.lengths.__getitem__,
                args.batch_size,
                args.per_device_train_batch_size,
                args.world_size,
                args.padding_free,
                args.dataloader_drop_last,
            )
        )
        spare_workers(loader.base_dataloader)
        return loader

    def num_examples(self, dataloader) -> int:
        """Samples of an epoch, which a mixture gives more or fewer of than there are rows."""
        if dataloader.dataset is self.train_dataset:
            return self.train_dataset.epoch_size
        return super().num_examples(dataloader)

    def get_eval_dataloader(self, eval_dataset=None):
        loader = super().get_eval_dataloader(eval_dataset)
        spare_workers(loader.base_dataloader)
        return loader

    def create_optimizer(self, model=None):
        if self.args.lora_plus_ratio is not None and self.optimizer is None:
            self.optimizer = lora_plus_optimizer(model or self.model, self.args)
        optimizer = super().create_optimizer(model)
        optimizer.param_groups[:] = group_by_rate(optimizer.param_groups, model or self.model, self.args)
        if self.args.deepspeed_config and type(optimizer).__module__.startswith("bitsandbytes"):
            optimizer.param_groups[:] = [part for group in optimizer.param_groups for part in _split(group)]
        return optimizer

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None) -> TrainOutput:
        """Trains, or takes the weights of a run or checkpoint that has nothing left to train."""
        nothing = TrainOutput(self.state.global_step, 0.0, {})
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
            if state.global_step >= state.max_steps or self._stopped_early(state):
                # Resumed at its last step, the Trainer would train one more.
                self.state, best = state, state.best_model_checkpoint
                if self.args.load_best_model_at_end and best and folder != Path(self.args.output_dir):
                    folder = Path(best)
                load_weights(self.model, folder)
                self._trained_weights = folder
                if self.is_world_process_zero():
                    print(f"nothing is left to train: the weights of {folder} are taken", flush=True)
                return nothing
        if not self.args.do_train:
            return nothing
        self._pending.checkpoint = resume_from_checkpoint
        rows: Any = self.train_dataset
        self._source_losses = SourceLosses(list(rows.sources))
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except torch.OutOfMemoryError as error:
            state = last_checkpoint(self.args.output_dir)
            raise out_of_memory(error, self.model, self.args, self.train_dataset, state) from error
        finally:
            self._progress.close()

    def _stopped_early(self, state: TrainerState) -> bool:
        """Whether the run had stopped early when this state was saved."""
        callbacks: Any = state.stateful_callbacks  # by name, once they are saved
        kept = callbacks.get(EarlyStoppingCallback.__name__, {})
        count = kept.get("attributes", {}).get("early_stopping_patience_counter", 0)
        return self.args.early_stopping_patience is not None and count >= self.args.early_stopping_patience

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """The Trainer's, and while training the task's own score beside the loss: eval_anls, eval_accuracy, ..."""
        # See `generate_answers`.
        with torch.compiler.set_stance("force_eager"):
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.is_in_train and self._score_answers is not None:
            with whole_weights(self.model_wrapped):
                figures, predictions = self._score_answers(self.model, self.eval_dataset, self.state.global_step)
            log_answers(self, predictions, self.eval_dataset)
            named = {f"{metric_key_prefix}_{name}": value for name, value in figures.items() if "/" not in name}
            output.metrics.update(named)
        return output

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = {name: value for name, value in inputs.items() if name not in ("ids", "sources")}
        if self.args.label_smoothing_factor and model.training:
            inputs["smoothing"] = self.args.label_smoothing_factor
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._nonfinite.note(inputs["ids"], loss)
        self._progress.count(inputs)
        loss = loss.nan_to_num(0, 0, 0)
        self._pending.add(loss)
        # The Trainer makes it a mean over the ranks' sum.
        self._source_losses.count(inputs, loss / self.args.world_size, num_items_in_batch)
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs["loss"] = self._pending.pop_mean(self.state)
            logs |= self._progress.pop_figures(self.args, self.state) | self._source_losses.pop()
            if "learning_rate" in logs:
                logs |= rates_of(self.optimizer, logs["learning_rate"])
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves and, for the run's final weights, seals them; those of a finished run stay as they are."""
        if output_dir is not None or _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        output = Path(self.args.output_dir)
        if not self.args.do_train or self.args.resume_from_checkpoint == str(output):
            return
        with _disk_errors(output, "the final weights", self.args.output_dir):
            if self._trained_weights is None:
                super().save_model()
            elif self.args.should_save:
                # The same files; DeepSpeed, which would write them, was never started.
                for path in final_files(self._trained_weights):
                    shutil.copy(path, output / path.name)
            self.save_state()
            run: dict[str, Any] = read_run(output) or {}
            facts = {"step": self.state.global_step, "identity": run.get("identity")}
            self.accelerator.wait_for_everyone()
            seal(output, facts, final_files(output))
        # For the answers after training; nothing is trained any more.
        whole_weights(self.model_wrapped).__enter__()

    def _save_checkpoint(self, model, trial):
        # Private: no public hook stands around the writing of all of a checkpoint's files, and only there can a full disk be
        # told from other errors (torch and safetensors raise RuntimeErrors of their own for it).
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self._saved_step == self.state.global_step:
            return
        if self.args.should_save:
            # Left by a run that died while it wrote, or that was not taken.
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with _disk_errors(folder, str(folder), self.args.output_dir):
            super()._save_checkpoint(model, trial)
        self._saved_step = self.state.global_step


def _split(group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A group of an optimizer as groups of at most `LARGEST_GROUP` parameters each, and at least one tensor."""
    parts: list[list[torch.nn.Parameter]] = [[]]
    size = 0
    for parameter in group["params"]:
        if parts[-1] and size + parameter.numel() > LARGEST_GROUP:
            parts.append([])
            size = 0
        parts[-1].append(parameter)
        size += parameter.numel()
    return ({**group, "params": part} for part in parts)


class _disk_errors:
    """Turns what goes wrong while files are written into one line that says what is left."""

    def __init__(self, folder: Path, what: str, output_dir: str):
        self.folder, self.what, self.output_dir = folder, what, output_dir

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if not isinstance(error, (OSError, RuntimeError, SafetensorError)) or isinstance(
            error, torch.distributed.DistError
        ):
            return
        shutil.rmtree(self.folder, ignore_errors=True) if self.folder.name.startswith("checkpoint-") else None
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        free = shutil.disk_usage(self.output_dir).free / 1e9
        raise RunError(
            f"{self.what} could not be written: {reason} ({free:.3f} GB are free there); {last_checkpoint(self.output_dir)}"
        ) from error
