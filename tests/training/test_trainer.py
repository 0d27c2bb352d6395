"""RecipeTrainer on a model of two weights: micro-batches, whole checkpoints, stops that lose nothing, steps that are not finite."""

import errno
import json
import math
import os
import random
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import recipe
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st

from finetuning import errors
from finetuning.arguments import RecipeArguments
from finetuning.data.sampler import BalancedSampler
from finetuning.errors import InputError, RunError, Stopped, run
from finetuning.training.checkpoint import check_checkpoint
from finetuning.training.signals import stop_signals
from finetuning.training.trainer import RecipeTrainer

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


class Counted(list):
    """Samples whose lengths are known, as those of a ConversationDataset that has been checked."""

    lengths = [7, 90, 15, 33, 8, 60, 12, 40, 21, 9, 75, 11]  # tokens

    def length(self, index):
        return self.lengths[index]


def collate(features):
    return {"ids": [feature["id"] for feature in features], "x": torch.stack([feature["x"] for feature in features])}


def trainer(*flags, model=None, rows=None) -> RecipeTrainer:
    folder = Path("model")
    if not folder.exists():
        recipe.model_folder(folder)
    args = recipe.arguments(
        folder, "--use_lora", "--batch_size", "2", "--max_steps", str(STEPS), "--learning_rate", "0.1", "--warmup_steps", "0",
        "--recompute", "none", "--save_steps", "2", "--logging_steps", "3", *flags,
    )  # fmt: skip
    return RecipeTrainer(
        model=model or Model(),
        args=args,
        train_dataset=rows or samples(),
        eval_dataset=samples(),
        data_collator=collate,
    )


@pytest.mark.parametrize(("recompute", "calls"), [("full", 0), ("vision", 1), ("none", 0)])
def test_the_language_model_keeps_its_activations_with_recompute_vision_only(recompute, calls, monkeypatch):
    found, kept = Model(), []
    found.activation_checkpointing_enable = lambda **_: kept.clear()  # undoes what is chosen before it
    monkeypatch.setattr("finetuning.training.trainer.keep_text_activations", kept.append)
    trainer("--recompute", recompute, model=found).train()
    assert kept == [found] * calls


def losses(found: RecipeTrainer) -> list[tuple]:
    return [(entry["step"], entry["loss"]) for entry in found.state.log_history if "loss" in entry]


def names(folder="output") -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


# ---- micro-batches


def cut(items: list, size: int) -> list[list]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def cost(micro_batch: list[int], padding_free: bool) -> int:
    """Tokens that a micro-batch of these lengths is computed with."""
    return sum(micro_batch) if padding_free else len(micro_batch) * max(micro_batch)


def read_naively(lengths: list[int], micro_batch: int, padding_free: bool) -> list[list[int]]:
    """The lengths of a step in micro-batches, the most expensive first."""
    lengths = sorted(lengths, reverse=True)
    if not padding_free:
        return cut(lengths, micro_batch)
    groups = [[] for _ in range(len(lengths) // micro_batch)]
    for length in lengths:
        min((group for group in groups if len(group) < micro_batch), key=sum).append(length)
    return sorted(groups, key=sum, reverse=True)


@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), st.booleans(), st.randoms(), st.data()
)
def test_samples_are_arranged_within_their_step(ranks, micro, accumulation, steps, padding_free, chance, data):
    batch = ranks * micro * accumulation
    order = list(range(batch * steps))
    chance.shuffle(order)
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=len(order), max_size=len(order)))
    sampler = BalancedSampler(order, lengths.__getitem__, batch, micro, ranks, padding_free)
    found = list(sampler)
    assert len(sampler) == len(found) == len(order)
    assert found == list(sampler)
    leaders = Counter()
    for before, after in zip(cut(order, batch), cut(found, batch), strict=True):
        assert sorted(before) == sorted(after)
        naive = read_naively([lengths[index] for index in before], micro, padding_free)
        groups = cut([lengths[index] for index in after], micro)
        # at the same time the ranks run what stands side by side in the order of costs
        for alike, together in zip(cut(naive, ranks), cut(groups, ranks), strict=True):
            expected = sorted(cost(group, padding_free) for group in alike)
            assert sorted(cost(group, padding_free) for group in together) == expected
        if len({cost(group, padding_free) for group in groups[:ranks]}) == ranks:
            leaders[max(range(ranks), key=lambda rank: cost(groups[rank], padding_free))] += 1
    # no rank has the most expensive one more often than its turn comes
    assert max(leaders.values(), default=0) <= -(-steps // ranks)


def test_a_step_that_is_not_whole_stays_as_it_is():
    assert list(BalancedSampler([2, 0, 1, 4, 3], int, 3, 1, 3, False))[3:] == [4, 3]


def micro_batches(monkeypatch, rows, ranks: int, micro: int, epoch: int, skip: int = 0, *flags) -> list[list[str]]:
    """The ids of an epoch's micro-batches over all ranks, as the Trainer reads them, in the order in which they are run.

    Args:
        skip (int): optimizer steps that a resumed run leaves out.
    """
    flags = ["--batch_size", "4", "--batch_size_per_gpu", str(micro), "--dataloader_num_workers", "0", *flags]
    found, shares = trainer(*flags, rows=rows), []
    found.args.gradient_accumulation_steps = 4 // ranks // micro
    for rank in range(ranks):
        spread = partial(prepare_data_loader, num_processes=ranks, process_index=rank, use_seedable_sampler=True)
        with monkeypatch.context() as patched:
            patched.setattr(RecipeArguments, "world_size", ranks)
            patched.setattr(found.accelerator, "prepare", spread)
            loader = found.get_train_dataloader()
        if skip:
            loader = skip_first_batches(loader, skip * found.args.gradient_accumulation_steps)
        loader.set_epoch(epoch)
        shares.append([batch["ids"] for batch in loader])
    return [ids for together in zip(*shares, strict=True) for ids in together]


@pytest.mark.parametrize("padding_free", ["True", "False"])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_every_step_sees_the_samples_it_saw_before_on_any_number_of_ranks(monkeypatch, ranks, micro, padding_free):
    flags = "--padding_free", padding_free
    orders = set()
    for epoch in range(3):
        plain = micro_batches(monkeypatch, samples(), 1, 1, epoch)
        orders.add(str(plain))
        found = micro_batches(monkeypatch, Counted(samples()), ranks, micro, epoch, 0, *flags)
        assert {len(ids) for ids in found} == {micro}
        per_step = 4 // micro
        assert [sorted(sum(step, [])) for step in cut(found, per_step)] == [
            sorted(sum(step, [])) for step in cut(plain, 4)
        ]
        # a resumed run reads the rest of the same order
        for skip in (1, 2):
            rest = micro_batches(monkeypatch, Counted(samples()), ranks, micro, epoch, skip, *flags)
            assert rest == found[skip * per_step :]
    assert len(orders) == 3


def test_like_lengths_share_a_micro_batch_unless_their_sums_count(monkeypatch):
    for flags, padding_free in (([], False), (["--padding_free"], True)):
        found = micro_batches(monkeypatch, Counted(samples()), 2, 2, 0, 0, *flags)
        lengths = [[Counted.lengths[int(name[1:])] for name in ids] for ids in found]
        for step in cut(lengths, 2):
            assert sorted(map(sorted, step)) == sorted(map(sorted, read_naively(sum(step, []), 2, padding_free)))


@pytest.mark.parametrize(
    ("rows", "flags"),
    [
        (samples(), ["--batch_size_per_gpu", "2"]),
        (Counted(samples()), []),
        (Counted(samples()), ["--batch_size_per_gpu", "2", "--train_sampling_strategy", "sequential"]),
    ],
    ids=["lengths unknown", "one sample at a time", "another order is asked for"],
)
def test_nothing_is_arranged(rows, flags):
    loader = trainer(*flags, rows=rows).get_train_dataloader()
    assert not isinstance(loader.get_sampler(), BalancedSampler)


@pytest.mark.parametrize("padding_free", [False, True])
def test_the_ranks_wait_less_and_less_is_padded(padding_free):
    ranks, micro, accumulation, steps, chance = 8, 4, 2, 160, random.Random(0)
    batch = ranks * micro * accumulation
    lengths = [round(math.exp(chance.uniform(math.log(10), math.log(2500)))) for _ in range(batch * steps)]
    order = list(range(len(lengths)))

    def tokens(sampler) -> tuple[int, int, int, int]:
        """Of an epoch: all, padding included; of the slowest rank, where the ranks wait for each other in each micro-step, and
        where they wait in each step; and the most in a micro-batch."""
        costs = [cost(group, padding_free) for group in cut([lengths[index] for index in sampler], micro)]
        together = cut(costs, ranks)
        sums = [map(sum, zip(*step, strict=True)) for step in cut(together, accumulation)]
        return sum(costs), sum(map(max, together)), sum(map(max, sums)), max(costs)

    arranged = BalancedSampler(order, lengths.__getitem__, batch, micro, ranks, padding_free)
    before, after = tokens(order), tokens(arranged)
    if padding_free:
        assert before[0] == after[0] == sum(lengths)
        # nearly what the longest sample alone takes
        assert after[3] < 1.1 * max(lengths) < 0.5 * before[3]
    else:
        assert before[0] - sum(lengths) > 10 * (after[0] - sum(lengths))
    assert before[1] > 1.7 * after[1]
    assert before[2] > 1.5 * after[2]


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


@pytest.mark.parametrize("micro", ["1", "2"])
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(micro):
    # three steps an epoch; with micro-batches of two their samples are arranged by length
    flags, rows = ["--batch_size", "4", "--batch_size_per_gpu", micro], Counted(samples())
    whole = trainer("--output_dir", "whole", "--save_total_limit", "9", *flags, rows=rows)
    whole.train()
    for step in (2, 4):
        again = trainer("--output_dir", f"from-{step}", *flags, rows=rows)
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
