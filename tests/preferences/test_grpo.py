"""finetune_trl_grpo.py: TRL's GRPOTrainer with the native model, rewarded by a task's own score (`make test-trl`)."""

import pytest

pytest.importorskip("trl", reason="TRL is installed by make test-trl, in an environment of its own")

import launch
import recipe
import tiny
import torch
import trl_runs
from trl import GRPOConfig, GRPOTrainer

import finetune_trl_grpo
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import ConversationDataset
from finetuning.data.questions import GroupProcessor, question_dataset
from finetuning.errors import InputError
from phi3v import Phi3VForCausalLM, Phi3VProcessor

own_process = pytest.fixture(autouse=True)(recipe.own_process)

# The DocVQA script with a score that random weights reach now and then.
SCRIPT = """
from finetune_hf_trainer_docvqa import load_splits, to_conversation

def score(predictions):
    texts = [item.answer for item in predictions]
    return {"early_letters": sum(sum(letter in "abcdefghijkl" for letter in text) / 6 for text in texts) / len(texts)}
"""
TRAIN = (
    *("--max_steps", "12", "--learning_rate", "1e-2", "--per_device_train_batch_size", "32", "--num_generations", "8"),
    *("--max_completion_length", "6", "--save_steps", "6", "--gradient_checkpointing", "False"),
    *("--per_device_eval_batch_size", "32"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipe.model_folder(tmp_path_factory.mktemp("grpo") / "base")


@pytest.fixture
def task(tmp_path):
    (tmp_path / "my_task.py").write_text(SCRIPT)
    return "--task", str(tmp_path / "my_task.py")


@pytest.fixture
def data(tmp_path):
    return recipe.docvqa_rows(tmp_path / "data", train=16, test=8)


def test_the_reward_rises_on_rows_held_back_and_a_resumed_run_ends_the_same(
    base, data, task, tmp_path, monkeypatch, capsys
):
    output = trl_runs.run(monkeypatch, finetune_trl_grpo, base, data, tmp_path / "run", *TRAIN, *task)
    before, after = (trl_runs.figures(output, stage)["reward"] for stage in ("before", "after"))
    assert after > before + 0.2
    assert trl_runs.figures(output, "after")["rewards/early_letters/mean"] == after

    flags = ("--resume_from_checkpoint", str(output / "checkpoint-6"))
    resumed = trl_runs.run(monkeypatch, finetune_trl_grpo, base, data, tmp_path / "resumed", *TRAIN, *task, *flags)
    assert trl_runs.history(resumed)[-6:] == trl_runs.history(output)[-6:]
    trl_runs.assert_equal(trl_runs.weights(resumed), trl_runs.weights(output))
    trl_runs.check_result(monkeypatch, capsys, base, output, tmp_path)


# No, one or two pictures, of one and of two crops.
CONVERSATIONS = [
    Conversation("none", [Turn("None?", ["1"])]),
    Conversation("one", [Turn("One?", ["2"], [tiny.picture(60, 20, 1)])]),
    Conversation("two", [Turn("Two?", ["3"], [tiny.picture(20, 20, 2), tiny.picture(20, 60, 3)])]),
    Conversation("other", [Turn("Other?", ["4"], [tiny.picture(20, 20, 4)])]),
]


def asked(base, processor_class) -> list[dict]:
    """Micro-batches that a GRPOTrainer gives to the model in an optimizer step."""
    plain = Phi3VProcessor.from_pretrained(base, num_crops=2)
    processor = processor_class(plain.image_processor, plain.tokenizer)
    rows = ConversationDataset(CONVERSATIONS, lambda row: row, plain, [0] * 4)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_generations": 2}
    trainer = GRPOTrainer(
        Phi3VForCausalLM.from_pretrained(base),
        reward_funcs=lambda completions, **_: [float(number % 2) for number in range(len(completions))],
        args=GRPOConfig(
            "output", use_cpu=True, bf16=False, max_steps=1, max_completion_length=4, report_to="none", **settings
        ),
        train_dataset=question_dataset(rows),
        processing_class=processor,
    )
    found = []
    original = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: found.append(dict(inputs)) or original(model, inputs)
    trainer.train()
    return found


def test_each_answer_is_scored_with_its_own_pictures_however_they_are_dealt(base):
    plain = Phi3VProcessor.from_pretrained(base, num_crops=2)
    batches = asked(base, GroupProcessor)
    assert len(batches) == 4
    names = []
    for batch in batches:
        crops, sizes = [], []
        for ids in batch["prompt_ids"]:
            text = plain.tokenizer.decode(ids)
            (conversation,) = (item for item in CONVERSATIONS if item.turns[0].user in text)
            names.append(conversation.id)
            if conversation.images:
                features = plain.image_processor(conversation.images)
                crops.append(features["pixel_values"])
                sizes.append(features["image_sizes"])
        if sizes:
            images = Phi3VForCausalLM.from_pretrained(base).model.vision_embed_tokens.split_images(
                batch["pixel_values"], batch["image_sizes"]
            )
            assert torch.equal(torch.cat(images), torch.cat(crops))
            assert torch.equal(batch["image_sizes"], torch.cat(sizes))
    assert sorted(names) == sorted(item.id for item in CONVERSATIONS * 2)


def test_the_plain_processor_is_not_enough_for_grpo(base):
    """TRL finds an answer's pictures by their number, and the plain processor has a row for each crop."""
    with pytest.raises(ValueError, match="expected padding=True"):
        asked(base, Phi3VProcessor)


def test_two_processes_train(base, data, task, tmp_path):
    paths = ("--model_name_or_path", str(base), "--data_dir", str(data))
    flags = (*trl_runs.FLAGS, *TRAIN, *task, "--max_steps", "3", "--per_device_train_batch_size", "16")
    two = launch.torchrun(tmp_path / "two", *paths, *flags, task=trl_runs.ROOT / "finetune_trl_grpo.py")
    assert two.status == 0, two.stderr
    entries = trl_runs.history(two.output)
    assert len(entries) == 3
    assert all(entry["reward"] > 0 and entry["grad_norm"] > 0 for entry in entries)
    assert trl_runs.figures(two.output, "after")["reward"] > 0


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--num_generations", "1"), "GRPO requires at least 2 generations per prompt"),
        (("--num_generations", "3"), "generation_batch_size (8) must be divisible by num_generations (3)."),
        (
            ("--num_generations_eval", "3"),
            "--per_device_eval_batch_size 8 on 1 process(es): expected a multiple of 3 answers",
        ),
        (("--task", "own_data"), "--task own_data: expected a task with a score of its own, found "),
        (("--task", "docqva"), "--task docqva: expected docvqa, "),
    ],
)
def test_wrong_flags_are_told_in_one_line(flags, line, base, data, tmp_path, monkeypatch):
    with pytest.raises(InputError) as caught:
        trl_runs.run(monkeypatch, finetune_trl_grpo, base, data, tmp_path / "run", *flags)
    assert str(caught.value).startswith(line)
    assert str(caught.value).isprintable()
