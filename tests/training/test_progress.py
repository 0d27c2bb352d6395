"""One line a log step, and its figures: what is counted, over which time, and how it is shown."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import recipe
import tiny
import torch

from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import ConversationDataset
from finetuning.training import progress
from finetuning.training.flops import step_flops
from finetuning.training.identity import write_run
from finetuning.training.loading import load_model
from finetuning.training.parts import STRATEGIES
from finetuning.training.progress import Progress, answers_bar, log_line
from finetuning.training.trainer import RecipeTrainer

STEPS = 5


own_process = pytest.fixture(autouse=True)(recipe.own_process)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return recipe.model_folder(tmp_path_factory.mktemp("model") / "tiny")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def to_conversation(number: int) -> Conversation:
    # One in three is text only, one shows two pictures.
    pictures = [tiny.picture(60, 40, number), tiny.picture(30, 30, number)][: number % 3]
    return Conversation(f"r{number}", [Turn("What is it?" * (1 + number % 2), [f"number {number}"], pictures)])


def data(rows: int = 10) -> ConversationDataset:
    return ConversationDataset(list(range(rows)), to_conversation, tiny.processor(2), [50] * rows)


def train(folder, *flags: str, resume: str | None = None, rows: int = 10, callbacks=()) -> RecipeTrainer:
    args = recipe.arguments(
        folder, "--use_lora", "--batch_size", "2", "--max_steps", str(STEPS), "--logging_steps", "2",
        "--save_strategy", "no", "--dataloader_num_workers", "0", "--recompute", "none", *flags,
    )  # fmt: skip
    write_run(Path(args.output_dir), {"settings": {}, "identity": "run"})
    found = RecipeTrainer(
        model=load_model(args),
        args=args,
        train_dataset=data(rows),
        eval_dataset=data(4),
        data_collator=DataCollatorForPhi3V(tiny.TOKENIZER.pad_token_id, args.padding_free),
        callbacks=callbacks,
    )
    found.train(resume_from_checkpoint=resume)
    return found


def logs(found: RecipeTrainer) -> list[dict]:
    return [entry for entry in found.state.log_history if "loss" in entry]


def totals(numbers) -> dict[str, int]:
    """What samples hold, by their own features."""
    features = [data()[number] for number in numbers]
    lengths = [len(feature["input_ids"]) for feature in features]
    return {
        "tokens": sum(lengths),
        "squares": sum(length**2 for length in lengths),
        "labels": sum(label != -100 for feature in features for label in feature["labels"][1:]),
        "images": sum(number % 3 for number in numbers),
        "crops": sum(len(feature["pixel_values"]) for feature in features if "pixel_values" in feature),
    }


def counted(found: Progress) -> dict[str, int]:
    tokens, squares, labels = found._on_device.tolist()
    return {
        "tokens": tokens, "squares": squares, "labels": labels, "images": found._images, "crops": found._crops,
    }  # fmt: skip


# ---- counting


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("numbers", [[0], [1, 2], [0, 1, 2, 3, 4, 5]])
def test_a_micro_batch_is_counted_without_its_padding(numbers, padding_free):
    found, collate = Progress(), DataCollatorForPhi3V(tiny.TOKENIZER.pad_token_id, padding_free)
    features = [data()[number] for number in numbers]
    # places without a sample count nothing
    found.count(collate([*features, None]))
    found.count(collate([None, None]))
    assert counted(found) == totals(numbers)


def test_counting_reads_nothing_from_the_device(monkeypatch):
    batch = DataCollatorForPhi3V(tiny.TOKENIZER.pad_token_id)([data()[1], data()[2]])

    def refused(*_):
        raise AssertionError("a value was read")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refused)
    Progress().count(batch)


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "perf_counter", lambda: self.now)


@pytest.fixture
def run(folder, monkeypatch):
    """A Progress in the middle of a run of 10 steps, its state and arguments, and the clock."""
    args = recipe.arguments(folder, "--use_lora", "--lora_rank", "4")
    state = SimpleNamespace(global_step=0, max_steps=10)
    clock, found, control = Clock(monkeypatch), Progress(), SimpleNamespace(should_log=False)
    found.on_train_begin(args, state, control, model=tiny.model())

    def step(seconds: float, then=()):
        """A step, and hooks that take a minute each: on_save, on_evaluate."""
        clock.now += seconds
        found.count(DataCollatorForPhi3V(0)([data()[1]]))
        state.global_step += 1
        found.on_step_end(args, state, control)
        for hook in then:
            clock.now += 60
            getattr(found, hook)(args, state, control)

    return SimpleNamespace(
        figures=lambda: found.pop_figures(args, state), step=step, clock=clock, args=args, state=state, found=found
    )


def test_figures_are_of_the_steps_since_the_last_log(run):
    sample = totals([1])
    run.step(2)
    run.step(4)
    expected = {"img_per_second": 2 / 6, "tokens_per_second": 2 * sample["tokens"] / 6, "seconds_per_step": 3}
    found = run.figures()
    assert found.pop("peak_memory_gb") > 0.05
    assert found == pytest.approx(expected, rel=1e-4)
    run.step(1)
    found = run.figures()
    assert (found["seconds_per_step"], found["img_per_second"]) == (1, 1)
    assert found["tokens_per_second"] == pytest.approx(sample["tokens"], rel=1e-4)


def test_evaluations_and_checkpoints_are_no_time_of_a_step(run):
    run.step(2, ["on_evaluate", "on_save"])
    run.step(4)
    assert run.figures()["seconds_per_step"] == 3


def test_the_remaining_time_holds_evaluations_and_leaves_the_first_step_out(run):
    run.step(1000)
    run.figures()
    assert run.found._remaining == 9000  # nothing else is known
    run.step(2, ["on_evaluate"])
    run.step(2, ["on_evaluate"])
    run.step(2)
    run.figures()
    assert run.found._remaining == pytest.approx(6 * (6 + 120) / 3)


def test_mfu_is_model_flops_over_the_rate_of_a_matrix_product(run):
    run.found._rate = 1e9
    run.step(2)
    sample = totals([1])
    flops = step_flops(
        tiny.config(), sample["tokens"], sample["squares"], sample["crops"], sample["labels"], STRATEGIES["lora"], 4
    )["step"]
    assert run.figures()["mfu"] == pytest.approx(flops / 2 / 1e9, rel=1e-4)


def test_counts_are_summed_over_the_ranks_and_memory_is_the_most(run, monkeypatch):
    run.step(2)
    monkeypatch.setattr(progress.dist, "is_initialized", lambda: True)

    def all_reduce(tensor, operation=progress.dist.ReduceOp.SUM):
        # as if two others had done the same, one of them with more memory
        tensor.fill_(7_000_000_000) if operation == progress.dist.ReduceOp.MAX else tensor.mul_(3)

    monkeypatch.setattr(progress.dist, "all_reduce", all_reduce)
    found = run.figures()
    assert found["img_per_second"] == 1.5
    assert found["tokens_per_second"] == pytest.approx(3 * totals([1])["tokens"] / 2, rel=1e-4)
    assert found["peak_memory_gb"] == 7.0


# ---- a whole run


def test_each_log_has_its_figures_and_the_last_step_is_logged(folder, capsys):
    found = train(folder)
    assert [entry["step"] for entry in logs(found)] == [1, 2, 4, 5]
    figures = {"img_per_second", "tokens_per_second", "seconds_per_step", "peak_memory_gb"}
    assert all(figures <= entry.keys() for entry in logs(found)[1:])
    shown = capsys.readouterr()
    lines = [line for line in shown.out.splitlines() if line.startswith("step ")]
    assert [line.split(" | ")[0] for line in lines] == [f"step {step} of 5" for step in (1, 2, 4, 5)]
    assert all(" left" in line and " tokens/s" in line and " GB" in line for line in lines)
    assert lines[-1].endswith("0:00:00 left")
    assert "trained 5 steps in 0:00" in shown.out
    assert not {"{", "\r"} & set(shown.out + shown.err)


def test_all_tokens_of_an_epoch_are_counted_once(folder):
    found = train(folder, "--batch_size_per_gpu", "2")
    seconds, before, tokens, images = 0, 0, 0, 0
    for entry in logs(found):
        seconds = entry["seconds_per_step"] * (entry["step"] - before)
        tokens += entry["tokens_per_second"] * seconds
        images += entry.get("img_per_second", 0) * seconds
        before = entry["step"]
    expected = totals(range(10))
    # the figures have five digits
    assert tokens == pytest.approx(expected["tokens"], rel=1e-3)
    assert images == pytest.approx(expected["images"], rel=1e-3)


def test_a_resumed_run_counts_only_what_it_does(folder, capsys):
    flags = ["--save_strategy", "steps", "--save_steps", "3", "--logging_steps", "100", "--logging_first_step", "False"]
    whole = train(folder, *flags)
    capsys.readouterr()
    found = train(folder, *flags, "--output_dir", "again", resume="output/checkpoint-3")
    (entry,) = logs(found)
    assert entry["loss"] == logs(whole)[0]["loss"]  # the mean of all five
    tokens = entry["tokens_per_second"] * 2 * entry["seconds_per_step"]
    assert tokens < 0.6 * totals(range(10))["tokens"]
    assert "trained 2 steps" in capsys.readouterr().out


def test_evaluation_is_one_readable_line(folder, capsys):
    train(folder, "--eval_strategy", "steps", "--eval_steps", "5")
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "evaluation" in line]
    assert line.startswith("step 5 of 5 | evaluation: loss ")


def test_nothing_is_logged_where_that_is_asked_for(folder):
    assert not logs(train(folder, "--logging_strategy", "no", "--logging_first_step", "False"))


@pytest.mark.parametrize(("flags", "terminal", "bars"), [([], True, 1), (["--no-tqdm"], True, 0), ([], False, 0)])
def test_a_bar_is_drawn_at_a_terminal_only(folder, monkeypatch, capsys, flags, terminal, bars):
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    if not flags:
        arguments = recipe.arguments
        monkeypatch.setattr(recipe, "arguments", lambda *given: with_bars(arguments(*given)))
    train(folder, *flags)
    assert ("training: 100%" in stderr.getvalue()) == bool(bars)
    assert ("\r" in stderr.getvalue()) == bool(bars)
    # The lines are the same, above the bar.
    assert capsys.readouterr().out.count("step 5 of 5 | loss") == 1


def with_bars(args):
    args.disable_tqdm = False
    return args


# ---- lines


def test_a_log_step_is_one_line():
    figures = {
        "loss": 1.23456, "grad_norm": 0.98765, "learning_rate": 3.9e-05, "img_per_second": 10.64, "mfu": 0.4123,
        "tokens_per_second": 25993.0, "seconds_per_step": 6.03, "peak_memory_gb": 34.12, "epoch": 0.5, "mine": 2.0,
    }  # fmt: skip
    assert log_line(figures, 30, 63, remaining=753.4) == (
        "step 30 of 63 | loss 1.235 | lr 3.9e-05 | grad norm 0.988 | 10.64 img/s | 25,993 tokens/s | 6.030 s/step | 34.1 GB | "
        "MFU 41.2% | mine 2 | 0:12:33 left"
    )


def test_an_evaluation_and_the_end_are_one_line():
    figures = {
        "eval_loss": 0.51234, "eval_anls": 0.83, "eval_per_class/a": 1.0, "eval_runtime": 34.2,
        "eval_samples_per_second": 6.0, "eval_steps_per_second": 1.0, "epoch": 1.0,
    }  # fmt: skip
    assert log_line(figures, 30, 63) == "step 30 of 63 | evaluation: loss 0.5123, anls 0.83 | 0:00:34"
    end = {"train_runtime": 380.0, "train_loss": 0.82, "train_samples_per_second": 2.6, "total_flos": 1e18}
    assert log_line(end, 63, 63, begun_step=40) == "trained 23 steps in 0:06:20 | mean loss 0.82 | 2.60 samples/s"
    assert log_line({"custom": 1.5}, 3, 9) == "step 3 of 9 | custom 1.5"
    assert log_line({"epoch": 1.0}, 3, 9) == ""


def test_answers_are_a_line_now_and_then_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0)
    with answers_bar(8, 2, "answers before training", disable=True) as bar:
        bar.update(2)
        bar.update(4)
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[-2].startswith("answers before training: 4 of 8, 00:00 passed, about ")
    assert lines[-1].startswith("answers before training: 8 of 8")
    assert "\r" not in shown.out + shown.err


def test_few_answers_say_nothing_before_their_score(capsys):
    with answers_bar(8, 0, "answers before training", disable=True) as bar:
        bar.update(8)
    shown = capsys.readouterr()
    assert not shown.out + shown.err
