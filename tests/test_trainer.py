"""RecipeTrainer on a model of two weights: whole checkpoints, stops that lose nothing, steps that are not finite."""

import errno
import json
import math
import os
import signal
from pathlib import Path

import pytest
import recipe
import torch

from finetuning import errors
from finetuning.checkpoint import check_checkpoint
from finetuning.errors import InputError, RunError, Stopped, run
from finetuning.signals import stop_signals
from finetuning.trainer import RecipeTrainer

STEPS = 6


@pytest.fixture(autouse=True)
def own_process(tmp_path, monkeypatch):
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    yield from recipe.own_process(tmp_path, monkeypatch)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    stop_signals.__init__()


class Model(torch.nn.Module):
    def __init__(self, event=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -0.5]))
        self.event, self.calls = event, 0

    def forward(self, x):
        self.calls += 1
        if self.event:
            self.event(self.calls)
        value = (x * self.weight).sum(-1)
        # The slope of a square root is infinite at 0, its value is not.
        return {"loss": torch.where(x.sum(-1) == 0, (value * value).sqrt(), value.square()).mean()}


def samples(**special) -> list[dict]:
    rows = [{"id": f"s{number}", "x": torch.tensor([0.1 * number + 0.1, 0.3])} for number in range(12)]
    return [{**row, "x": torch.tensor(special.get(row["id"], row["x"].tolist()))} for row in rows]


def collate(features):
    return {"ids": [feature["id"] for feature in features], "x": torch.stack([feature["x"] for feature in features])}


def trainer(*flags, model=None, rows=None) -> RecipeTrainer:
    folder = Path("model")
    if not folder.exists():
        recipe.model_folder(folder)
    args = recipe.arguments(
        folder, "--use_lora", "--batch_size", "2", "--max_steps", str(STEPS), "--learning_rate", "0.1", "--warmup_steps", "0",
        "--activation_checkpointing", "False", "--save_steps", "2", "--logging_steps", "3", *flags,
    )  # fmt: skip
    return RecipeTrainer(
        model=model or Model(),
        args=args,
        train_dataset=rows or samples(),
        eval_dataset=samples(),
        data_collator=collate,
    )


def losses(found: RecipeTrainer) -> list[tuple]:
    return [(entry["step"], entry["loss"]) for entry in found.state.log_history if "loss" in entry]


def names(folder="output") -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


# ---- checkpoints


def test_checkpoints_get_their_name_when_they_are_whole(monkeypatch):
    seen = []
    found = trainer("--save_total_limit", "1")
    complete = found._complete
    monkeypatch.setattr(found, "_complete", lambda folder: (seen.append(names()), complete(folder)))
    found.train()
    # while each was written there was the one before it, and it had no name of its own
    assert [{name for name in names if name.startswith(("checkpoint", "."))} for names in seen] == [
        {".saving"},
        {".saving", "checkpoint-2"},
        {".saving", "checkpoint-4"},
    ]
    assert names() == {"checkpoint-6"}
    check_checkpoint(Path("output/checkpoint-6"), adapter=False)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")])
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(monkeypatch, error):
    found = trainer("--save_total_limit", "1")
    save = found._save_optimizer_and_scheduler

    def fails(folder):
        if folder.endswith("-4"):
            raise error
        save(folder)

    monkeypatch.setattr(found, "_save_optimizer_and_scheduler", fails)
    with pytest.raises(
        RunError, match="checkpoint-4 could not be written: .*; the last good checkpoint is .*checkpoint-2"
    ):
        found.train()
    assert names() == {"checkpoint-2"}
    check_checkpoint(Path("output/checkpoint-2"), adapter=False)


def test_a_resumed_run_ends_as_if_it_had_not_been_stopped():
    whole = trainer("--output_dir", "whole", "--save_total_limit", "9")
    whole.train()
    for step in (2, 4):
        again = trainer("--output_dir", f"from-{step}")
        again.train(resume_from_checkpoint=f"whole/checkpoint-{step}")
        assert torch.equal(again.model.weight, whole.model.weight)
        # a loss that is logged over steps before and after the checkpoint too
        assert losses(again) == losses(whole)


def test_resumed_at_its_last_step_nothing_is_trained_any_more():
    # Two steps before the end of its epoch: there would be something left to train.
    rows = samples() + [{**row, "id": row["id"] + "b"} for row in samples()[:4]]
    whole = trainer(rows=rows)
    whole.train()
    again = trainer("--output_dir", "again", rows=rows)
    again.train(resume_from_checkpoint="output/checkpoint-6")
    assert again.model.calls == 0
    assert torch.equal(again.model.weight, whole.model.weight)


def test_the_best_checkpoint_is_named_where_it_is():
    flags = [
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "2",
        "--load_best_model_at_end",
        "--metric_for_best_model",
        "runtime",
    ]
    found = trainer(*flags)
    found.train()
    state = json.loads(
        (Path("output") / f"checkpoint-{found.state.best_global_step}" / "trainer_state.json").read_text()
    )
    assert Path(state["best_model_checkpoint"]).is_dir()


# ---- signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_stops(signum):
    whole = trainer("--output_dir", "whole")
    whole.train()
    stopped = trainer(model=Model(lambda call: call == 6 and os.kill(os.getpid(), signum)))
    with pytest.raises(Stopped, match=rf"stopped by {signum.name}: checkpoint-3 is written") as caught:
        stopped.train()
    assert caught.value.signum == signum
    check_checkpoint(Path("output/checkpoint-3"), adapter=False)
    stop_signals.__init__()
    again = trainer("--output_dir", "again")
    again.train(resume_from_checkpoint="output/checkpoint-3")
    assert torch.equal(again.model.weight, whole.model.weight)
    assert losses(again) == losses(whole)


def test_a_second_signal_stops_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    stop_signals.install()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # launcher and scheduler at the same time
    assert (stop_signals.signum, ended) == (signal.SIGTERM, [])
    stop_signals._since -= 3
    os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [143]


# ---- what is not finite


@pytest.mark.parametrize(("value", "what"), [([float("nan")] * 2, "loss"), ([0.0, 0.0], "gradient")])
def test_a_step_that_is_not_finite_stops_the_run(value, what):
    rows = samples(s5=value)
    found = trainer(rows=rows)
    with pytest.raises(RunError, match=rf"step \d: the {what} of .*s5.* is not finite") as caught:
        found.train()
    assert "--on_nonfinite skip" in str(caught.value)
    # it never reached the weights
    assert found.model.weight.isfinite().all()


def test_a_step_that_is_not_finite_can_be_skipped(capsys):
    found = trainer("--on_nonfinite", "skip", rows=samples(s5=[float("inf"), 0.0]))
    found.train()
    assert found.state.global_step == STEPS
    assert found.model.weight.isfinite().all()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped: ")]
    assert "s5" in line
    assert all(math.isfinite(loss) for _, loss in losses(found))


def test_too_many_in_a_row_stop_the_run_all_the_same():
    found = trainer(
        "--on_nonfinite", "skip", "--max_steps", "50", rows=samples(**{f"s{n}": [float("nan")] * 2 for n in range(12)})
    )
    with pytest.raises(RunError, match="step 10: the loss of"):
        found.train()


# ---- what ends a run


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("expected a, found b"), 2, "error: expected a, found b"),
        (RunError("it cannot go on"), 1, "error: it cannot go on"),
        (Stopped(signal.SIGTERM, "checkpoint-3 is written"), 143, "stopped by SIGTERM: checkpoint-3 is written"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), 1, "--batch_size_per_gpu 1"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "Too many open files"),
        (torch.distributed.DistNetworkError("port: 29500, EADDRINUSE"), 1, "--master_port"),
        (torch.distributed.DistBackendError("NCCL error"), 1, "lost contact with the other processes (NCCL error)"),
        (RuntimeError("gloo: Connection closed by peer [127.0.0.1]"), 1, "lost contact with the other processes"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_ends_a_run_is_one_line(error, status, line, monkeypatch, capsys):
    class Ended(BaseException):
        pass

    def end(status):
        raise Ended(status)

    def main():
        raise error

    monkeypatch.setattr(errors.os, "_exit", end)
    with pytest.raises(Ended) as ended:
        run(main)
    assert ended.value.args == (status,)
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a fault of ours"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        FileNotFoundError(2, "gone"),
        ZeroDivisionError(),
    ],
)
def test_a_fault_of_the_code_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run(main)
