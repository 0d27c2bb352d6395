"""What happens at the Trainer's public hooks: epochs, gradients, steps that are not finite, checkpoints, signals."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import rotate_checkpoints

from ..errors import RunError, Stopped
from .checkpoint import find_checkpoints, seal
from .identity import RUN, read_run
from .parts import keep_text_activations, model_part
from .signals import stop_signals

NONFINITE_IN_A_ROW = 10
# Loss scaling halves its scale each time: 65536 is 1 by then. DeepSpeed would end with a traceback two later.
OVERFLOWS_IN_A_ROW = 16


def last_checkpoint(folder: str) -> str:
    """The newest checkpoint of a folder, as the end of a sentence."""
    found = find_checkpoints(Path(folder))
    if not found:
        return "there is no checkpoint yet"
    return f"the last good checkpoint is {found[0]}, the same command goes on from it"


class PrepareTraining(TrainerCallback):
    """Settles what training starts with, whatever came before it: random numbers, recomputed layers, DeepSpeed's checks."""

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        # Evaluation may have drawn random numbers, or was left out because its answers are kept. A resumed run loads the
        # checkpoint's generators after this.
        set_seed(args.seed)
        if args.recompute == "vision":
            keep_text_activations(model)
        if args.deepspeed_config:
            # So that DeepSpeed leaves a step that is not finite out in float32 too.
            optimizer.optimizer.check_grad_overflow = True


class NonFiniteCheck(TrainerCallback):
    """Stops the run, or leaves the step out, when a loss or gradient is not finite: before it reaches the weights."""

    def __init__(self):
        self._losses: list[tuple[list[str], torch.Tensor]] = []
        self._in_a_row = self._overflows = 0

    def note(self, ids: list[str], loss: torch.Tensor) -> None:
        """Notes the loss of a micro-batch of the step that runs; `RecipeTrainer.training_step` calls it."""
        self._losses.append((ids, loss))

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        losses, self._losses = self._losses, []
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if args.deepspeed_config:
            # Its step is done by now, or was left out, on all ranks alike.
            finite = not optimizer.step_was_skipped
        else:
            finite = bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        if finite:
            self._in_a_row = self._overflows = 0
            return
        bad = gather_object([name for ids, loss in losses if not loss.isfinite() for name in ids])
        if args.fp16 and not bad:
            # Loss scaling finds its scale so.
            self._overflows += 1
            if self._overflows >= OVERFLOWS_IN_A_ROW:
                raise RunError(
                    f"step {state.global_step + 1}: the gradients overflow float16 {OVERFLOWS_IN_A_ROW} times in a row, whatever the "
                    f"loss is scaled by; {last_checkpoint(args.output_dir)}. --bf16 (Ampere or newer), `--fp16 False` (float32) or "
                    "a lower --learning_rate may help"
                )
            return
        self._in_a_row += 1
        names = bad or gather_object([name for ids, _ in losses for name in ids])
        message = (
            f"step {state.global_step + 1}: the {'loss' if bad else 'gradient'} of {', '.join(names)} is not finite"
        )
        if args.on_nonfinite == "stop" or self._in_a_row >= NONFINITE_IN_A_ROW:
            raise RunError(
                f"{message}; {last_checkpoint(args.output_dir)}. A lower --learning_rate or --bf16 may help; --on_nonfinite skip "
                f"leaves such steps out (up to {NONFINITE_IN_A_ROW} in a row)"
            )
        if state.is_world_process_zero:
            print(f"skipped: {message}", flush=True)
        if not args.deepspeed_config:
            for parameter in model.parameters():
                parameter.grad = None


class PendingLoss(TrainerCallback):
    """The losses since the last log. They belong to a checkpoint: else the first loss that a resumed run logs would be another.

    The Trainer's own sum of them is not saved, and out of reach of any public hook.
    """

    def __init__(self):
        self._sum, self._logged_step = torch.zeros(()), 0
        # Where training goes on from; `RecipeTrainer.train` says it.
        self.checkpoint: str | None = None

    def add(self, loss: torch.Tensor) -> None:
        """Adds the loss of a micro-batch; `RecipeTrainer.training_step` calls it."""
        self._sum = self._sum.to(loss.device) + loss

    def pop_mean(self, state) -> float:
        """Mean loss of a step since the last log, over all ranks, which call it together; begins anew."""
        total = self._sum.clone()
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        mean = total.item() / max(1, state.global_step - self._logged_step)
        self._sum, self._logged_step = torch.zeros_like(self._sum), state.global_step
        return mean

    def on_train_begin(self, args, state, control, **kwargs):
        self._sum, self._logged_step = torch.zeros((), device=args.device), state.global_step
        folder = Path(self.checkpoint or "")
        files = sorted(folder.glob("pending_loss_*.json")) if self.checkpoint else []
        if files:
            pending = [json.loads(path.read_text()) for path in files]
            own = folder / f"pending_loss_{args.process_index}.json"
            # With another number of processes, the mean: what is logged is a mean over them.
            same = len(files) == args.world_size and own in files
            loss = json.loads(own.read_text())["sum"] if same else sum(item["sum"] for item in pending) / len(pending)
            self._sum, self._logged_step = self._sum + loss, pending[0]["logged_step"]

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        pending = {"sum": self._sum.item(), "logged_step": self._logged_step}
        (folder / f"pending_loss_{args.process_index}.json").write_text(json.dumps(pending))


class SealCheckpoint(TrainerCallback):
    """Ends each checkpoint with its manifest, and only then removes older ones."""

    def __init__(self):
        self._limit = None

    def on_train_begin(self, args, state, control, **kwargs):
        # The Trainer would remove the older ones before this one is sealed.
        self._limit, args.save_total_limit = args.save_total_limit, None

    def on_save(self, args, state, control, **kwargs):
        output = Path(args.output_dir)
        folder = output / f"checkpoint-{state.global_step}"
        run: dict[str, Any] = read_run(output) or {}
        if state.is_world_process_zero:
            shutil.copy(output / RUN, folder / RUN)
        seal(folder, {"step": state.global_step, "identity": run.get("identity")})
        if state.is_world_process_zero:
            rotate_checkpoints(str(output), self._limit, state.best_model_checkpoint)

    def on_train_end(self, args, state, control, **kwargs):
        args.save_total_limit = self._limit


class StopOnSignal(TrainerCallback):
    """After SIGTERM or SIGINT on any rank: saves a checkpoint after the current step, and ends the run."""

    def __init__(self):
        self._signum = 0
        stop_signals.install()

    def on_step_end(self, args, state, control, **kwargs):
        self._signum = stop_signals.agree(args.device)
        if self._signum:
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args, state, control, **kwargs):
        if self._signum:
            raise Stopped(self._signum, f"checkpoint-{state.global_step} is written to {args.output_dir}")


class GradientCheck(TrainerCallback):
    """After the first optimizer step, stops a run in which a part that should learn received no gradient at all.

    Parameter hooks see the gradient under DDP, DeepSpeed and PEFT alike.
    """

    def __init__(self, model):
        self._hooks, self._seen = [], {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                part = model_part(name)
                self._seen.setdefault(part, [0, 0])
                self._hooks.append(parameter.register_hook(self._watch(part)))

    def _watch(self, part: str):
        def hook(gradient):
            self._seen[part][0] += 1
            self._seen[part][1] += int(bool(gradient.any()))

        return hook

    def on_step_end(self, args, state, control, **kwargs):
        """Sums over all ranks, so that one without an image in its first batch is no fault."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        seen = torch.tensor([self._seen[part] for part in sorted(self._seen)], device=args.device)
        if dist.is_initialized():
            dist.all_reduce(seen)
        for part, (received, nonzero) in zip(sorted(self._seen), seen.tolist(), strict=True):
            if not received:
                raise RuntimeError(
                    f"{part}: expected gradients in the first step, found none: it is cut off from the loss"
                )
            if not nonzero and state.is_world_process_zero:
                print(f"warning: {part}: all gradients of the first step are 0 (no image in its samples?)", flush=True)
