"""RecipeTrainer on a model of two weights: rows once an epoch, sealed checkpoints, stops that lose nothing, finite steps."""

import errno
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import recipe
import tiny
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from finetuning.arguments import RecipeArguments
from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.encoding import encode_conversation
from finetuning.data.sampler import StepSampler
from finetuning.errors import InputError, RunError, Stopped
from finetuning.results.rounds import answer_in_rounds
from finetuning.training import callbacks, checkpoint
from finetuning.training.checkpoint import find_checkpoints, find_damage, read_manifest
from finetuning.training.identity import write_run
from finetuning.training.signals import spare_workers, stop_signals
from finetuning.training.summary import count_steps
from finetuning.training.trainer import RecipeTrainer

STEPS = 6


@pytest.fixture(autouse=True)
def own_process(tmp_path, monkeypatch):
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    yield from recipe.own_process(tmp_path, monkeypatch)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    stop_signals.__init__()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return recipe.model_folder(tmp_path_factory.mktemp("model") / "tiny")


class Model(torch.nn.Module):
    """Each sample has one label; the loss is normalised over the step, as that of Phi3VForCausalLM."""

    all_tied_weights_keys = {}

    def __init__(self, event=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -0.5]))
        self.event, self.calls, self.samples = event, 0, 0

    def forward(self, x, labels, num_items_in_batch=None, **kwargs):
        self.calls += 1
        self.samples += len(x)
        if self.event:
            self.event(self.calls)
        value = (x * self.weight).sum(-1)
        # The slope of a square root is infinite at 0, its value is not.
        losses = torch.where(x.sum(-1) == 0, (value * value).sqrt(), value.square())
        return {"loss": losses.sum() / (num_items_in_batch or max(1, len(x)))}


class Samples(list):
    """Samples whose lengths are known, as those of a ConversationDataset that has been checked."""

    mixture, sources = None, ()

    def __init__(self, rows):
        super().__init__(rows)
        self.lengths = [(7, 90, 15, 33, 8, 60, 12, 40, 21, 9, 75, 11)[number % 12] for number in range(len(rows))]
        self.epochs, self.read = [], []

    @property
    def epoch_size(self):
        return len(self)

    def sample(self, _):
        return self

    def start_epoch(self, epoch):
        self.epochs.append(epoch)
        self.read.append(Counter())

    def __getitem__(self, index):
        if index is None:
            return None
        if self.read:
            self.read[-1][index] += 1
        return super().__getitem__(index)


def samples(count: int = 12, **special) -> Samples:
    rows = [{"id": f"s{number}", "x": torch.tensor([0.1 * number + 0.1, 0.3])} for number in range(count)]
    return Samples([{**row, "x": torch.tensor(special.get(row["id"], row["x"].tolist()))} for row in rows])


def collate(features):
    found = [feature for feature in features if feature is not None]
    x = torch.stack([feature["x"] for feature in found]) if found else torch.zeros(0, 2)
    # labels count from the second on
    return {
        "ids": [feature["id"] for feature in found],
        "x": x,
        "labels": torch.tensor([[-100, 1]] * len(found)).view(-1, 2),
    }


@pytest.fixture
def trainer(folder):
    def build(*flags, model=None, rows=None) -> RecipeTrainer:
        args = recipe.arguments(
            folder, "--use_lora", "--batch_size", "2", "--max_steps", str(STEPS), "--learning_rate", "0.1",
            "--warmup_steps", "0", "--recompute", "none", "--save_steps", "2", "--logging_steps", "3",
            "--dataloader_num_workers", "0", *flags,
        )  # fmt: skip
        record = {"script": "x.py", "settings": {}, "spread": {}, "rows": {}, "started": "", "identity": "run"}
        write_run(Path(args.output_dir), record)
        return RecipeTrainer(
            model=model or Model(),
            args=args,
            train_dataset=samples() if rows is None else rows,
            eval_dataset=samples(),
            data_collator=collate,
        )

    return build


def resume(trainer, checkpoint: str, *flags: str, **options) -> RecipeTrainer:
    """Goes on from a checkpoint in another folder, as a script does: `begin_or_resume` leaves its name in the arguments."""
    output = f"from-{Path(checkpoint).name}"
    found = trainer("--output_dir", output, "--resume_from_checkpoint", checkpoint, *flags, **options)
    found.train(resume_from_checkpoint=found.args.resume_from_checkpoint)
    return found


def losses(found: RecipeTrainer) -> list[tuple]:
    return [(entry["step"], entry["loss"]) for entry in found.state.log_history if "loss" in entry]


def names(folder="output") -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def checkpoints(folder="output") -> list[str]:
    """Names of the checkpoints that hold, oldest first."""
    return [path.name for path in find_checkpoints(Path(folder))[::-1] if find_damage(path) is None]


# ---- rows and steps


@pytest.mark.parametrize("padding_free", ["False", "True"])
@pytest.mark.parametrize(
    ("rows", "batch", "micro"),
    [(12, 4, 1), (18, 16, 1), (18, 16, 3), (33, 16, 16), (1, 16, 1), (5, 4, 2), (16, 64, 4), (7, 3, 3)],
)
def test_every_row_is_trained_once_an_epoch(trainer, rows, batch, micro, padding_free):
    flags = ["--batch_size", str(batch), "--batch_size_per_gpu", str(micro), "--padding_free", padding_free]
    found = trainer(*flags, "--max_steps", "-1", "--num_train_epochs", "2", "--save_strategy", "no", rows=samples(rows))
    found.train()
    assert found.train_dataset.epochs == [0, 1]
    assert [dict(read) for read in found.train_dataset.read] == [dict.fromkeys(range(rows), 1)] * 2
    assert found.model.samples == 2 * rows
    assert found.state.global_step == 2 * math.ceil(rows / batch) == count_steps(found.args, rows)
    # without a sample no micro-batch is run on the only rank
    assert found.model.calls == sum(math.ceil(min(batch, rows - at) / micro) for at in range(0, rows, batch)) * 2


def test_the_last_step_of_an_epoch_is_normalised_by_its_own_samples(trainer):
    # A model whose gradient is the mean over the samples of a step: with the wrong count it would be another.
    rows, seen = samples(5), []
    flags = ["--batch_size", "4", "--max_steps", "-1", "--num_train_epochs", "1", "--logging_steps", "1"]
    found = trainer(*flags, "--optim", "sgd", "--weight_decay", "0", "--save_strategy", "no", rows=rows)
    found.model.event = lambda _: seen.append(found.model.weight.detach().clone())
    found.train()
    weight, order = seen[4], [list(read) for read in rows.read][0]
    (last,) = order[4:]
    expected = float((rows[last]["x"] * weight).sum() ** 2)
    assert losses(found)[-1] == (2, pytest.approx(expected, rel=1e-5))


def test_drop_last_leaves_the_rest_of_an_epoch_out(trainer):
    flags = ["--batch_size", "4", "--max_steps", "-1", "--num_train_epochs", "2", "--dataloader_drop_last"]
    found = trainer(*flags, "--save_strategy", "no", rows=samples(11))
    found.train()
    assert found.state.global_step == 4 == count_steps(found.args, 11)
    assert found.model.samples == 16


def test_a_resumed_epoch_reads_the_rest_of_its_rows(trainer):
    flags = ["--batch_size", "4", "--max_steps", "-1", "--num_train_epochs", "3", "--save_total_limit", "9"]
    whole = trainer(*flags, rows=samples(11))
    whole.train()
    again = resume(trainer, "output/checkpoint-4", *flags, rows=samples(11))
    # three steps an epoch: the second epoch has read four of its rows
    assert again.train_dataset.epochs == [1, 2]
    assert again.model.samples == 7 + 11
    assert torch.equal(again.model.weight, whole.model.weight)


def cut(items: list, size: int) -> list[list]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def micro_batches(trainer, monkeypatch, rows, ranks: int, micro: int, epoch: int, skip: int = 0, flags=()):
    """Ids of the micro-batches of an epoch, those of all ranks that are run at the same time one after another.

    Args:
        skip (int): optimizer steps that a resumed run leaves out.
    """
    found = trainer("--batch_size", "4", "--batch_size_per_gpu", str(micro), *flags, rows=rows)
    rounds, shares = -(-4 // (ranks * micro)), []
    for rank in range(ranks):
        spread = partial(prepare_data_loader, num_processes=ranks, process_index=rank, use_seedable_sampler=True)
        with monkeypatch.context() as patched:
            patched.setattr(RecipeArguments, "world_size", ranks)
            patched.setattr(found.accelerator, "prepare", spread)
            loader = found.get_train_dataloader()
        assert isinstance(loader.get_sampler(), StepSampler)
        if skip:
            loader = skip_first_batches(loader, skip * rounds)
        loader.set_epoch(epoch)
        shares.append([batch["ids"] for batch in loader])
    return [ids for together in zip(*shares, strict=True) for ids in together]


@pytest.mark.parametrize("padding_free", ["True", "False"])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (1, 4), (1, 3), (2, 1), (2, 2), (3, 1), (4, 1), (3, 2)])
@pytest.mark.parametrize("count", [12, 10])
def test_every_step_has_the_same_samples_on_any_number_of_ranks(
    trainer, monkeypatch, ranks, micro, padding_free, count
):
    flags = "--padding_free", padding_free
    orders, rounds = set(), -(-4 // (ranks * micro))
    for epoch in range(3):
        plain = micro_batches(trainer, monkeypatch, samples(count), 1, 1, epoch)
        assert all(len(ids) == 1 for ids in plain)
        orders.add(str(plain))
        found = micro_batches(trainer, monkeypatch, samples(count), ranks, micro, epoch, 0, flags)
        steps = cut(found, rounds * ranks)
        assert [sorted(sum(step, [])) for step in steps] == [sorted(sum(step, [])) for step in cut(plain, 4)]
        # a resumed run reads the rest of the same order
        for skip in (1, 2):
            rest = micro_batches(trainer, monkeypatch, samples(count), ranks, micro, epoch, skip, flags)
            assert rest == found[skip * rounds * ranks :]
    assert len(orders) == 3


@pytest.mark.parametrize(("recompute", "calls"), [("full", 0), ("vision", 1), ("none", 0)])
def test_the_language_model_keeps_its_activations_with_recompute_vision_only(trainer, recompute, calls, monkeypatch):
    found, kept = Model(), []
    found.activation_checkpointing_enable = lambda **_: kept.clear()  # undoes what is chosen before it
    monkeypatch.setattr("finetuning.training.callbacks.keep_text_activations", kept.append)
    trainer("--recompute", recompute, model=found).train()
    assert kept == [found] * calls


# ---- the loss


def pages() -> list[dict]:
    turns = [Turn("What is it?", ["a cat"], [tiny.picture(60, 40)]), Turn("Hello?", ["a longer answer"])]
    return [encode_conversation(Conversation(str(n), [turn]), tiny.processor(2)) for n, turn in enumerate(turns)]


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_that_of_torch_over_shifted_labels(trainer, smoothing, padding_free):
    model = tiny.model(attention="sdpa_packed" if padding_free else "sdpa").train()
    found = trainer("--label_smoothing_factor", str(smoothing), model=model)
    batch = DataCollatorForPhi3V(tiny.TOKENIZER.pad_token_id, padding_free)(pages())
    asked = {name: value for name, value in batch.items() if name != "ids"}
    logits = model(**{name: value for name, value in asked.items() if name != "labels"}).logits
    targets = batch["labels"][:, 1:].flatten()
    for count in (None, torch.tensor(50)):
        expected = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, label_smoothing=smoothing, reduction="sum"
        ) / (count or (targets != -100).sum())
        loss = found.compute_loss(model, dict(batch), num_items_in_batch=count)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_evaluation_is_not_smoothed(trainer):
    model = tiny.model().eval()
    found = trainer("--label_smoothing_factor", "0.5", model=model)
    batch = DataCollatorForPhi3V(tiny.TOKENIZER.pad_token_id)(pages())
    plain = trainer(model=model).compute_loss(model, dict(batch))
    assert torch.equal(found.compute_loss(model, dict(batch)), plain)


def test_the_logged_loss_is_the_mean_of_the_steps(trainer):
    # Without the first step, which is logged by itself: steps 1 to 3, 4 to 6.
    each = trainer("--logging_steps", "1", "--output_dir", "each")
    each.train()
    both = trainer("--logging_first_step", "False")
    both.train()
    single = dict(losses(each))
    assert losses(both) == [
        (step, pytest.approx(sum(single[step - back] for back in range(3)) / 3, rel=1e-5)) for step in (3, 6)
    ]


# ---- checkpoints


def test_checkpoints_are_sealed_and_know_their_run(trainer):
    trainer("--save_total_limit", "9").train()
    assert checkpoints() == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for step in (2, 4, 6):
        manifest = read_manifest(Path(f"output/checkpoint-{step}"))
        assert (manifest["step"], manifest["identity"]) == (step, "run")
        needed = {
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "trainer_state.json",
            "run.json",
            "model.safetensors",
        }
        assert needed | {"pending_loss_0.json"} <= set(manifest["files"])


@pytest.mark.parametrize("limit", ["1", "2"])
def test_there_is_always_a_whole_checkpoint(trainer, monkeypatch, limit):
    """Seen at each file that is removed and before each manifest: `--save_total_limit 1` keeps the old until the new is whole."""
    seen = []
    for name in ("seal", "rotate_checkpoints"):
        original = getattr(callbacks, name)

        def spy(*args, original=original, **kwargs):
            seen.append(checkpoints())
            return original(*args, **kwargs)

        monkeypatch.setattr(callbacks, name, spy)
    removed, remove = [], shutil.rmtree

    def removing(path, *args, **kwargs):
        removed.append((Path(path).name, checkpoints()))
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", removing)
    trainer("--save_total_limit", limit).train()
    assert seen[:2] == [[], ["checkpoint-2"]]
    assert all(seen[1:])
    whole = [(name, found) for name, found in removed if name in ("checkpoint-2", "checkpoint-4") and name in found]
    assert [name for name, _ in whole] == (["checkpoint-2", "checkpoint-4"] if limit == "1" else ["checkpoint-2"])
    assert all(len(found) > int(limit) for _, found in whole)
    assert checkpoints() == ["checkpoint-4", "checkpoint-6"][-int(limit) :]


ERRORS = {
    "no space": OSError(errno.ENOSPC, "No space left on device"),
    "torch's own": RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file"),
    "safetensors' own": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(trainer, monkeypatch, error):
    found = trainer("--save_total_limit", "1")
    save = found._save_optimizer_and_scheduler

    def fails(folder):
        if folder.endswith("-4"):
            raise error
        save(folder)

    monkeypatch.setattr(found, "_save_optimizer_and_scheduler", fails)
    pattern = r"checkpoint-4 could not be written: .* GB are free there\); the last good checkpoint is .*checkpoint-2, "
    with pytest.raises(RunError, match=pattern) as caught:
        found.train()
    assert len(str(caught.value).splitlines()) == 1
    assert checkpoints() == ["checkpoint-2"]
    assert "checkpoint-4" not in names()


def test_a_disk_that_is_full_at_the_manifest_leaves_the_checkpoint_before(trainer, monkeypatch):
    seal = checkpoint.seal

    def fails(folder, facts):
        if facts["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        seal(folder, facts)

    monkeypatch.setattr("finetuning.training.callbacks.seal", fails)
    # `errors.run_script` has a line for it
    with pytest.raises((OSError, RunError), match="No space left on device"):
        trainer("--save_total_limit", "1").train()
    assert checkpoints() == ["checkpoint-2"]


def test_what_is_no_fault_of_the_disk_keeps_its_own_name(trainer, monkeypatch):
    found = trainer()

    def fails(_):
        raise ZeroDivisionError

    monkeypatch.setattr(found, "_save_optimizer_and_scheduler", fails)
    with pytest.raises(ZeroDivisionError):
        found.train()


def test_what_a_run_left_that_died_while_it_saved_is_written_again(trainer):
    folder = Path("output/checkpoint-2")
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_text("half")
    (folder / "stale.bin").write_text("from before")
    trainer("--save_total_limit", "9").train()
    assert checkpoints() == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert not (folder / "stale.bin").exists()


@pytest.mark.parametrize(("rows", "batch", "micro"), [(12, "4", "1"), (12, "4", "2"), (10, "4", "3"), (11, "2", "1")])
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(trainer, rows, batch, micro):
    # logged every three steps, saved every two: a loss is logged over steps before and after the checkpoint
    flags = ["--batch_size", batch, "--batch_size_per_gpu", micro, "--save_total_limit", "9", "--max_steps", "8"]
    whole = trainer("--output_dir", "whole", *flags, rows=samples(rows))
    whole.train()
    # the last step is logged, whatever its number
    assert [step for step, _ in losses(whole)] == [1, 3, 6, 8]
    for step in (2, 4, 6):
        again = resume(trainer, f"whole/checkpoint-{step}", *flags, rows=samples(rows))
        assert torch.equal(again.model.weight, whole.model.weight)
        assert losses(again) == losses(whole)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            one, two = (
                torch.load(f"{folder}/checkpoint-8/{name}", weights_only=False)
                for folder in ("whole", f"from-checkpoint-{step}")
            )
            assert str(one) == str(two)


def test_training_begins_with_the_same_random_numbers_whatever_came_before(trainer):
    # An evaluation before it draws some, or is left out, because its answers are kept.
    seen = []
    for drawn in (0, 7):
        found = trainer(model=Model(lambda call: call == 1 and seen.append(torch.rand(3).tolist())))
        torch.rand(drawn)
        found.train()
    assert seen[0] == seen[1]
    trainer("--seed", "1", model=Model(lambda call: call == 1 and seen.append(torch.rand(3).tolist()))).train()
    assert seen[2] != seen[0]


class Drawing(Model):
    """Draws random numbers in each call, as dropout does."""

    def forward(self, x, labels, **kwargs):
        return super().forward(x + 0.1 * torch.rand_like(x), labels, **kwargs)


def test_a_resumed_run_draws_the_random_numbers_of_the_whole_one(trainer):
    whole = trainer("--output_dir", "whole", "--save_total_limit", "9", model=Drawing())
    whole.train()
    torch.rand(3)  # an evaluation before
    again = resume(trainer, "whole/checkpoint-4", model=Drawing())
    assert torch.equal(again.model.weight, whole.model.weight)
    assert losses(again) == losses(whole)


@pytest.mark.parametrize("weights", ["1", "2"])
def test_with_another_number_of_processes_the_pending_loss_is_their_mean(trainer, weights):
    trainer("--save_total_limit", "9").train()
    folder = Path("output/checkpoint-2")
    for rank, total in enumerate((0.5, 1.5)[: int(weights)]):
        (folder / f"pending_loss_{rank}.json").write_text(json.dumps({"sum": total, "logged_step": 1}))
    again = trainer("--output_dir", "again", "--logging_first_step", "False")
    again._pending.checkpoint = str(folder)
    again._pending.on_train_begin(again.args, again.state, again.control)
    again.state.global_step = 2
    assert again._pending.pop_mean(again.state) == (0.5 if weights == "1" else 1.0)


def test_resumed_at_its_last_step_nothing_is_trained_any_more(trainer, capsys):
    # Two steps before the end of its epoch: there would be something left to train.
    whole = trainer(rows=samples(16))
    whole.train()
    again = trainer("--output_dir", "again", rows=samples(16))
    again.train(resume_from_checkpoint="output/checkpoint-6")
    assert again.model.calls == 0
    assert torch.equal(again.model.weight, whole.model.weight)
    assert again.state.global_step == STEPS
    assert "nothing is left to train: the weights of output/checkpoint-6 are taken" in capsys.readouterr().out


BEST = [
    "--load_best_model_at_end",
    "--eval_strategy",
    "steps",
    "--eval_steps",
    "2",
    "--metric_for_best_model",
    "eval_loss",
]


def worse_after(step: int) -> Model:
    """A model whose loss on the rows to answer is least after this step."""

    class Worse(Model):
        found = None

        def forward(self, x, labels, **kwargs):
            outputs = super().forward(x, labels, **kwargs)
            if self.training:
                return outputs
            return {"loss": outputs["loss"] * 0 + abs(self.found.state.global_step - step)}

    return Worse()


@pytest.mark.parametrize("best", [2, 4, 6])
@pytest.mark.parametrize("limit", ["1", "9"])
def test_the_best_weights_are_taken_at_the_end(trainer, best, limit):
    model = worse_after(best)
    found = trainer(*BEST, "--save_total_limit", limit, model=model)
    model.found = found
    found.train()
    found.save_model()
    expected = load_file(f"output/checkpoint-{best}/model.safetensors")["weight"]
    assert found.state.best_global_step == best
    assert torch.equal(found.model.weight, expected)
    assert torch.equal(load_file("output/model.safetensors")["weight"], expected)
    assert {f"checkpoint-{best}", "checkpoint-6"} <= set(checkpoints())
    # resumed at its last step it takes the best weights too
    again = trainer(*BEST, "--output_dir", "again", model=worse_after(best))
    again.train(resume_from_checkpoint="output/checkpoint-6")
    assert torch.equal(again.model.weight, expected)


# ---- final weights


def test_final_weights_are_sealed(trainer):
    found = trainer()
    found.train()
    found.save_model()
    manifest = read_manifest(Path("output"))
    assert (manifest["step"], manifest["identity"]) == (STEPS, "run")
    assert {"model.safetensors", "trainer_state.json"} <= set(manifest["files"])
    # what is written later or by others is not sealed
    assert not {"run.json", "eval_before.json"} & set(manifest["files"])
    assert find_damage(Path("output")) is None
    assert torch.equal(load_file("output/model.safetensors")["weight"], found.model.weight)


def test_a_disk_that_is_full_at_the_end_names_the_last_checkpoint(trainer, monkeypatch):
    found = trainer()
    found.train()

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("finetuning.training.trainer.seal", fails)
    with pytest.raises(
        RunError, match=r"the final weights could not be written: .*last good checkpoint is .*checkpoint-6"
    ):
        found.save_model()
    assert checkpoints() == ["checkpoint-4", "checkpoint-6"]


def test_saving_elsewhere_is_the_trainers_own(trainer):
    found = trainer()
    found.save_model("elsewhere")
    assert "model.safetensors" in names("elsewhere")
    assert "manifest.json" not in names("elsewhere")


def test_a_finished_run_is_not_trained_nor_saved_again(trainer, capsys):
    found = trainer()
    found.train()
    found.save_model()
    before = {path: path.stat().st_mtime_ns for path in Path("output").rglob("*") if path.name != "run.json"}
    again = trainer("--resume_from_checkpoint", "output")
    again.train(resume_from_checkpoint="output")
    again.save_model()
    assert again.model.calls == 0
    assert torch.equal(again.model.weight, found.model.weight)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "the weights of output are taken" in capsys.readouterr().out


def test_do_train_false_trains_and_saves_nothing(trainer):
    found = trainer("--do_train", "False")
    found.train()
    found.save_model()
    assert found.model.calls == 0
    assert names() == {"run.json"}


def test_do_train_false_on_a_finished_run_takes_its_weights(trainer):
    found = trainer()
    found.train()
    found.save_model()
    again = trainer("--do_train", "False", "--resume_from_checkpoint", "output")
    again.train(resume_from_checkpoint="output")
    assert again.model.calls == 0
    assert torch.equal(again.model.weight, found.model.weight)


def test_weights_that_lack_something_are_refused(trainer):
    whole = trainer()
    whole.train()
    torch.nn.Module.register_parameter(other := Model(), "more", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(InputError, match="expected weights of the whole model, found none for more"):
        trainer("--output_dir", "again", model=other).train(resume_from_checkpoint="output/checkpoint-6")


# ---- files


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_permissions_that_the_umask_allows(trainer, monkeypatch, umask):
    monkeypatch.setattr(checkpoint, "UMASK", umask)
    before = os.umask(umask)
    try:
        found = trainer()
        found.train()
        found.save_model()
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in Path("output").rglob("*") if path.is_file()}
    assert len(modes) > 20
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_a_token_is_in_no_file(trainer):
    secret = "hf_" + "s3cr3t" * 5
    found = trainer("--hub_token", secret)
    assert os.environ["HF_TOKEN"] == secret
    assert found.args.hub_token is None
    found.train()
    found.save_model()
    paths = [path for path in Path().rglob("*") if path.is_file()]
    assert len(paths) > 20
    assert not [path for path in paths if secret.encode() in path.read_bytes()]


# ---- signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("call", [5, 6])
def test_a_signal_saves_after_the_step_and_stops(trainer, signum, call):
    whole = trainer("--output_dir", "whole")
    whole.train()
    stopped = trainer(model=Model(lambda calls: calls == call and os.kill(os.getpid(), signum)))
    with pytest.raises(Stopped, match=rf"stopped by {signum.name}: checkpoint-3 is written to output") as caught:
        stopped.train()
    assert caught.value.signum == signum
    assert checkpoints() == ["checkpoint-2", "checkpoint-3"]
    stop_signals.__init__()
    again = resume(trainer, "output/checkpoint-3")
    assert torch.equal(again.model.weight, whole.model.weight)
    assert losses(again) == losses(whole)


def test_a_signal_in_a_step_that_is_saved_anyway_writes_one_checkpoint(trainer, monkeypatch):
    sealed, seal = [], checkpoint.seal
    monkeypatch.setattr("finetuning.training.callbacks.seal", lambda *args: (sealed.append(args[0].name), seal(*args)))
    found = trainer(model=Model(lambda calls: calls == 4 and os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Stopped, match="checkpoint-2 is written"):
        found.train()
    assert sealed == ["checkpoint-2"]
    assert checkpoints() == ["checkpoint-2"]


def test_a_signal_in_the_last_step_keeps_what_was_trained(trainer):
    found = trainer(model=Model(lambda calls: calls == 2 * STEPS and os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Stopped, match=f"checkpoint-{STEPS} is written"):
        found.train()
    assert checkpoints()[-1] == f"checkpoint-{STEPS}"


def test_a_signal_stops_before_an_evaluation(trainer):
    found = trainer("--eval_strategy", "steps", "--eval_steps", "1")

    def event(call):
        assert found.model.training
        if call == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    found.model.event = event
    with pytest.raises(Stopped, match="checkpoint-1 is written"):
        found.train()


def signal_every_process(call: int):
    """An event that sends SIGTERM to all processes, as Slurm does, and again, as torchrun."""

    def event(calls):
        if calls == call:
            # Not all children: other tests of this process may have left a helper of torch's or multiprocessing's.
            workers = [process.pid for process in multiprocessing.active_children()]
            assert len(workers) == 2
            for _ in range(2):
                subprocess.run(["kill", "-TERM", *map(str, workers), str(os.getpid())], check=True)
            time.sleep(0.5)

    return event


@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_signal_to_every_process_saves_too(trainer, call):
    whole = trainer("--output_dir", "whole")
    whole.train()
    stopped = trainer("--dataloader_num_workers", "2", model=Model(signal_every_process(call)))
    step = (call + 1) // 2
    with pytest.raises(Stopped, match=f"checkpoint-{step} is written"):
        stopped.train()
    stop_signals.__init__()
    again = resume(trainer, f"output/checkpoint-{step}", "--dataloader_num_workers", "2")
    assert torch.equal(again.model.weight, whole.model.weight)
    assert losses(again) == losses(whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_ends_with_its_loader_and_not_by_a_signal(signum):
    loader = spare_workers(DataLoader(range(10), num_workers=1, prefetch_factor=1))
    found = []
    for number in loader:
        found.append(number)
        (worker,) = multiprocessing.active_children()
        subprocess.run(["kill", f"-{signum.value}", str(worker.pid)], check=True)
    assert found == list(range(10))
    worker.join(20)
    assert not worker.is_alive()


def test_the_workers_that_prepare_prompts_are_spared():
    def answer(batch, inputs):
        (worker,) = multiprocessing.active_children()
        if batch == [1]:
            subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        return inputs

    rounds = answer_in_rounds(range(20), list, range(20), 1, 1, answer)
    assert [pair for found in rounds for pair in found] == [(number, number) for number in range(20)]


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


@pytest.mark.parametrize(
    ("value", "what"), [([float("nan")] * 2, "loss"), ([float("inf"), 0.0], "loss"), ([0.0, 0.0], "gradient")]
)
@pytest.mark.parametrize("micro", ["1", "2"])
def test_a_step_that_is_not_finite_stops_the_run(trainer, value, what, micro):
    found = trainer("--batch_size_per_gpu", micro, rows=samples(s5=value))
    with pytest.raises(RunError, match=rf"step \d: the {what} of .*s5.* is not finite") as caught:
        found.train()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "--on_nonfinite skip" in message
    # a loss is a micro-batch's, so that of one sample names it alone
    assert ("s5 is not" in message) == (what == "loss" and micro == "1") or micro == "2"
    # it never reached the weights
    assert found.model.weight.isfinite().all()
    step = int(re.search(r"step (\d)", message)[1])
    assert ("last good checkpoint" in message) == (step > 2)


def test_a_step_that_is_not_finite_can_be_skipped(trainer, capsys):
    found = trainer("--on_nonfinite", "skip", rows=samples(s5=[float("inf"), 0.0]))
    found.train()
    assert found.state.global_step == STEPS
    assert found.model.weight.isfinite().all()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped: ")]
    assert re.fullmatch(r"skipped: step \d: the loss of s5 is not finite", line)
    assert all(math.isfinite(loss) for _, loss in losses(found))


def test_a_skipped_step_changes_no_weight(trainer):
    found = trainer(
        "--on_nonfinite", "skip", "--max_steps", "5", "--weight_decay", "0.5",
        rows=samples(**{f"s{n}": [float("nan")] * 2 for n in range(12)}),
    )  # fmt: skip
    found.train()
    assert found.state.global_step == 5
    assert torch.equal(found.model.weight, Model().weight)


def test_ten_in_a_row_stop_the_run_all_the_same(trainer):
    found = trainer(
        "--on_nonfinite", "skip", "--max_steps", "50", rows=samples(**{f"s{n}": [float("nan")] * 2 for n in range(12)})
    )
    with pytest.raises(RunError, match="step 10: the loss of"):
        found.train()
    assert found.state.global_step == 9


def test_ten_that_are_not_in_a_row_do_not_stop_it(trainer):
    # every second step of the twenty is bad
    calls = []
    found = trainer("--on_nonfinite", "skip", "--max_steps", "22")
    forward = found.model.forward

    def sometimes(x, **kwargs):
        calls.append(1)
        outputs = forward(x, **kwargs)
        return {"loss": outputs["loss"] * (float("nan") if (len(calls) - 1) // 2 % 2 else 1)}

    found.model.forward = sometimes
    found.train()
    assert found.state.global_step == 22
