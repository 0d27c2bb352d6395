"""Experiment trackers: refused before the model loads where they cannot work, and what they get."""

import json
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import recipe
import tiny
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from finetuning import arguments
from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import ConversationDataset
from finetuning.errors import InputError
from finetuning.training.identity import write_run
from finetuning.training.loading import load_model
from finetuning.training.trackers import log_answers
from finetuning.training.trainer import RecipeTrainer

needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")


own_process = pytest.fixture(autouse=True)(recipe.own_process)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return recipe.model_folder(tmp_path_factory.mktemp("model") / "tiny")


# ---- flags


class Tracker(TrainerCallback):
    """One that is installed."""


class Missing(TrainerCallback):
    def __init__(self):
        raise RuntimeError("MissingCallback requires it to be installed")


@pytest.fixture
def trackers(monkeypatch):
    """Which trackers there are: some of transformers' names, with a class in place of their callbacks."""

    def set_up(installed=("tensorboard", "wandb"), broken=()):
        known = dict.fromkeys(("tensorboard", "wandb", "mlflow", "clearml"), Missing)
        known |= dict.fromkeys(installed, Tracker)
        for module in (arguments, integration_utils):
            monkeypatch.setattr(module, "INTEGRATION_TO_CALLBACK", known)
        monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: [*installed, *broken])

    return set_up


@pytest.fixture
def wandb(monkeypatch, trackers):
    """A wandb whose server is not asked: `wandb(mode, login)`, login True, False or what it raises."""
    trackers()

    def set_up(mode: str, login):
        module = ModuleType("wandb")
        module.Error = type("Error", (Exception,), {})
        module.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode))
        module.asked = []

        def log_in(prompt, verify):
            assert not prompt
            module.asked.append(verify)
            if isinstance(login, str):
                raise module.Error(login)
            return login

        module.login = log_in
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return set_up


@pytest.mark.parametrize(
    "given", [["tensorboard", "wandb"], ["tensorboard,wandb"], ["tensorboard,", "wandb", "tensorboard"], ["all"]]
)
def test_several_trackers_at_once(folder, wandb, given):
    wandb("offline", False)
    assert recipe.arguments(folder, "--report_to", *given).report_to == ["tensorboard", "wandb"]


def test_without_the_flag_there_is_none(folder):
    assert recipe.arguments(folder).report_to == []
    assert recipe.arguments(folder, "--report_to", "none").report_to == []


@pytest.mark.parametrize(
    ("given", "installed", "broken", "expected"),
    [
        (["mlflow"], [], [], "--report_to mlflow: expected it installed, found that it is not; pip install mlflow"),
        (["tensorboard", "mlflow"], ["tensorboard"], [], "--report_to mlflow: expected it installed"),
        (["mlflow"], [], ["mlflow"], "found one that fails: MissingCallback requires"),
        (["tensorboard", "magic"], ["tensorboard"], [], "--report_to magic: expected trackers of none, all, clearml"),
        (["none", "tensorboard"], ["tensorboard"], [], "--report_to none: expected trackers of"),
    ],
)
def test_a_tracker_that_cannot_work_is_refused(folder, trackers, given, installed, broken, expected):
    trackers(installed, broken)
    with pytest.raises(InputError) as caught:
        recipe.arguments(folder, "--report_to", *given)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("login", "expected"),
    [
        (False, "expected you to be logged in, found no API key"),
        ("the key is too short\nand so on", "the key is too short;"),
    ],
)
def test_wandb_without_a_login_is_refused(folder, wandb, login, expected):
    wandb("online", login)
    with pytest.raises(InputError) as caught:
        recipe.arguments(folder, "--report_to", "tensorboard", "wandb")
    message = str(caught.value)
    assert expected in message
    assert "WANDB_MODE=offline" in message
    assert len(message.splitlines()) == 1


def test_wandb_is_taken_logged_in_or_without_a_server(folder, wandb):
    assert not wandb("offline", False).asked
    recipe.arguments(folder, "--report_to", "wandb")
    module = wandb("online", True)
    assert recipe.arguments(folder, "--report_to", "wandb").report_to == ["wandb"]
    assert module.asked == [True]


# ---- what they get


@dataclass
class Answer:
    id: str
    turn: int
    question: str
    answer: str
    references: list[str] = field(default_factory=lambda: ["a cat", "cat"])


def to_conversation(number: int) -> Conversation:
    turns = [Turn("What is it?", ["a cat", "cat"], [tiny.picture(60, 40, number), tiny.picture(900, 300, number)])]
    if number == 2:
        # text alone, two turns
        turns = [Turn("First?", ["one"]), Turn("Second?", ["two"])]
    return Conversation(f"r{number}", turns)


def data(rows: int) -> ConversationDataset:
    return ConversationDataset(list(range(rows)), to_conversation, tiny.processor(1), [50] * rows)


class AnswerAtEvaluation(TrainerCallback):
    """Where `RecipeTrainer` answers rows during training."""

    trainer = None

    def on_evaluate(self, args, state, control, **kwargs):
        dataset = self.trainer.eval_dataset
        answers = [
            Answer(f"r{number}", turn, "What is it?", f"<b>|\n{state.global_step}")
            for number in dataset.rows
            for turn in range(len(to_conversation(number).turns))
        ]
        log_answers(self.trainer, answers, dataset, count=4)


def train(folder, *report_to: str, rows: int = 12) -> RecipeTrainer:
    args = recipe.arguments(
        folder, "--use_lora", "--batch_size", "2", "--max_steps", "4", "--logging_steps", "2", "--save_strategy", "no",
        "--dataloader_num_workers", "0", "--recompute", "none", "--eval_strategy", "steps", "--eval_steps", "2",
        *(["--report_to", *report_to] if report_to else []),
    )  # fmt: skip
    write_run(Path(args.output_dir), {"settings": {}, "identity": "run"})
    asked = AnswerAtEvaluation()
    asked.trainer = RecipeTrainer(
        model=load_model(args),
        args=args,
        train_dataset=data(8),
        eval_dataset=data(rows),
        data_collator=DataCollatorForPhi3V(tiny.TOKENIZER.pad_token_id),
        callbacks=[asked],
    )
    asked.trainer.train()
    return asked.trainer


def events(where: str = "output/runs"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(where)
    found.Reload()
    return found


@needs_tensorboard
def test_tensorboard_holds_figures_settings_answers_and_pictures(folder):
    trainer = train(folder, "tensorboard")
    found = events()
    scalars = found.Tags()["scalars"]
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "img_per_second", "peak_memory_gb"):
        assert f"train/{name}" in scalars
    logged = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert {event.step: event.value for event in found.Scalars("train/loss")} == pytest.approx(logged)
    assert [event.step for event in found.Scalars("eval/loss")] == [2, 4]
    # four of twelve rows, evenly spread; each evaluation shows the same
    pictures = {f"answers/r{number}" for number in (0, 3, 6, 9)}
    assert set(found.Tags()["images"]) == pictures
    for name in pictures:
        assert [(event.step, event.width, event.height) for event in found.Images(name)] == [
            (2, 540, 160),
            (4, 540, 160),
        ]
    texts = [event.tensor_proto.string_val[0].decode() for event in found.Tensors("answers/text_summary")]
    assert len(texts) == 2
    assert "| r3 | What is it? | a cat / cat | &lt;b&gt;&#124; 4 |" in texts[1].splitlines()
    settings = json.loads(found.Tensors("args/text_summary")[0].tensor_proto.string_val[0])
    assert settings["num_crops"] == 2
    assert settings["use_lora"] is True


@needs_tensorboard
def test_a_row_of_text_has_no_picture_and_every_turn_its_answer(folder):
    train(folder, "tensorboard", rows=3)
    found = events()
    assert set(found.Tags()["images"]) == {"answers/r0", "answers/r1"}
    (_, last) = found.Tensors("answers/text_summary")
    lines = last.tensor_proto.string_val[0].decode().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| r0", "| r1", "| r2", "| r2"]


@needs_tensorboard
def test_a_run_that_goes_on_writes_into_the_same_folder(folder):
    train(folder, "tensorboard")
    train(folder, "tensorboard")
    assert len(list(Path("output/runs").iterdir())) == 2
    assert not [path for path in Path("output/runs").iterdir() if path.is_dir()]


def test_without_a_tracker_no_picture_is_opened(folder, monkeypatch):
    monkeypatch.setattr("finetuning.training.trackers.load_images", None)
    train(folder)


@needs_wandb
@needs_tensorboard
def test_wandb_and_tensorboard_at_once(folder, monkeypatch, tmp_path):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()  # settings of an earlier test
    train(folder, "tensorboard", "wandb")
    summary, config = dict(wandb.run.summary), dict(wandb.run.config)
    files = Path(wandb.run.dir)
    wandb.finish()
    wandb.teardown()  # the record is written by then
    assert {"train/loss", "train/tokens_per_second", "eval/loss", "eval/answers"} <= summary.keys()
    assert summary["eval/answers"]["_type"] == "table-file"
    table = json.loads((files / summary["eval/answers"]["path"]).read_text())
    assert [row[0] for row in table["data"]] == ["r0", "r3", "r6", "r9"]
    assert table["columns"] == ["id", "picture", "question", "expected", "answer"]
    assert [row[1] for row in table["data"]] == ["Image"] * 4
    # The files themselves go with the table's artifact, which the run's record lists.
    (record,) = files.parent.glob("*.wandb")
    assert record.read_bytes().count(b"media/images/") >= 4
    assert config["num_crops"] == 2
    found = events()
    assert "train/loss" in found.Tags()["scalars"]
    assert len(found.Tags()["images"]) == 4
