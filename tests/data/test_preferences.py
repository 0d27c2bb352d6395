"""What TRL's trainers are fed: pairs of answers, questions, rewards. Without TRL, which has an environment of its own."""

import io
import sys
from types import SimpleNamespace

import hub
import pytest
import recipe
import tiny
import torch
from datasets import Features, Value

import finetune_trl_dpo
import finetune_trl_grpo
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import ConversationDataset
from finetuning.data.encoding import encode_conversation
from finetuning.data.preferences import PreferenceCollator, preference_dataset
from finetuning.data.questions import GroupProcessor, question_dataset
from finetuning.data.trl_rows import LazyDataset
from finetuning.errors import InputError
from finetuning.results.reward import reward_of
from finetuning.task_script import load_script
from phi3v.modeling_phi3_v import IGNORE_INDEX

own_process = pytest.fixture(autouse=True)(recipe.own_process)

PROCESSOR = tiny.processor(num_crops=2)
# Two pictures of one and of two crops, one, none.
PAIRS = [
    {"id": "two", "images": [tiny.picture(60, 20, 1), tiny.picture(20, 20, 2)], "prompt": "Same?", "chosen": "No.", "rejected": "Yes, both."},
    {"id": "one", "images": [tiny.picture(20, 60, 3)], "prompt": "Which?", "chosen": "A long answer.", "rejected": "B"},
    {"id": "none", "prompt": "Who?", "chosen": "I", "rejected": "You"},
]  # fmt: skip


def message(role: str, text: str, *parts: dict) -> list[dict]:
    return [{"role": role, "content": [*parts, {"type": "text", "text": text}]}]


def dataset(rows: list, to_conversation=finetune_trl_dpo.to_conversation) -> ConversationDataset:
    return ConversationDataset(rows, to_conversation, PROCESSOR, [0] * len(rows))


def png() -> bytes:
    stream = io.BytesIO()
    tiny.picture(20, 30).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    "row",
    [
        {"id": 7, "images": ["a.png"], "prompt": "Which?", "chosen": "A", "rejected": "B"},
        {
            "id": "7",
            "images": ["a.png"],
            "prompt": message("user", "Which?", {"type": "image", "text": None}),
            "chosen": message("assistant", "A"),
            "rejected": [{"role": "assistant", "content": "B"}],
        },
        {"idx": 7, "image": "a.png", "question": "Which?", "chosen": "A", "rejected": "B", "origin_split": "{}"},
        {"id": "7", "idx": 9, "image": "a.png", "question": "Which?", "chosen": "A", "rejected": "B"},
    ],
    ids=["texts", "messages", "RLAIF-V", "RLAIF-V of the hub"],
)
def test_each_form_of_a_row_gives_the_same_conversation(row):
    expected = Conversation("7", [Turn("Which?", ["A", "B"], ["a.png"])])
    assert finetune_trl_dpo.to_conversation(row) == expected


def test_pictures_of_rlaif_v_are_bytes():
    row = {"idx": 0, "image": {"bytes": png(), "path": None}, "question": "?", "chosen": "A", "rejected": "B"}
    assert preference_dataset(dataset([row]))[0]["chosen"]["image_sizes"].tolist() == [[28, 28]]


def test_rlaif_v_of_the_hub_its_first_rows_held_back(tmp_path, monkeypatch):
    # Columns as on https://huggingface.co/datasets/openbmb/RLAIF-V-Dataset
    features = {
        "ds_name": Value("string"),
        "image": {"bytes": Value("binary"), "path": Value("string")},
        "question": Value("string"),
        "chosen": Value("string"),
        "rejected": Value("string"),
        "idx": Value("int64"),
    }
    rows = [
        {"ds_name": "x", "image": {"bytes": png(), "path": "a.jpg"}, "question": f"{number}?", "chosen": "A", "rejected": "B", "idx": 7}
        for number in range(5)
    ]  # fmt: skip
    monkeypatch.setattr(finetune_trl_dpo, "HELD_OUT", 2)
    with hub.Hub() as found:
        files = hub.card([{"name": "default", "files": {"train": "RLAIF*"}}]), hub.parquet(rows, Features(features))
        found.put("datasets/openbmb/RLAIF-V-Dataset", dict(zip(("README.md", "RLAIF_000.parquet"), files, strict=True)))
        hub.use(found.endpoint, tmp_path / "home", monkeypatch)
        args = SimpleNamespace(data_dir=None, do_train=True, local_process_index=0, hub_data=[])
        train, held_back = map(list, finetune_trl_dpo.load_splits(args))
    asked = [[finetune_trl_dpo.to_conversation(row).turns[0].user for row in rows] for rows in (train, held_back)]
    assert asked == [["2?", "3?", "4?"], ["0?", "1?"]]
    assert len({finetune_trl_dpo.to_conversation(row).id for row in (*train, *held_back)}) == 5
    assert preference_dataset(dataset(train))[0]["chosen"]["image_sizes"].tolist() == [[28, 28]]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"rejected": "No."}, "sample two: rejected: expected another answer than chosen, found the same, 'No.'"),
        ({"rejected": None}, "sample two: rejected: expected text, found null"),
        ({"chosen": message("assistant", "A") * 2}, "sample two: chosen: expected text, found "),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "sample two: prompt: expected text, found "),
        ({"prompt": [{"role": "user", "content": None}]}, "sample two: prompt: expected text, found null"),
        ({"images": [None]}, "sample two: images[0]: expected a picture"),
    ],
)
def test_a_bad_row_is_told_in_one_line(change, line):
    with pytest.raises(InputError) as caught:
        finetune_trl_dpo.to_conversation(PAIRS[0] | change)
    assert str(caught.value).startswith(line)
    assert str(caught.value).isprintable()


def test_a_batch_holds_what_the_recipes_would_train_first_all_chosen_answers_then_the_rejected_ones():
    pairs = preference_dataset(dataset(PAIRS))
    batch = PreferenceCollator(0)([pairs[number] for number in range(3)])
    assert batch.keys() == {
        "input_ids", "attention_mask", "completion_mask", "pixel_values", "image_sizes",
    }  # fmt: skip
    expected = [
        encode_conversation(Conversation("x", [Turn(row["prompt"], [row[which]], row.get("images", []))]), PROCESSOR)
        for which in ("chosen", "rejected")
        for row in PAIRS
    ]
    for row, features in enumerate(expected):
        length = len(features["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == features["input_ids"]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (len(batch["input_ids"][row]) - length)
        trained = [int(label != IGNORE_INDEX) for label in features["labels"]]
        assert batch["completion_mask"][row].tolist() == trained + [0] * (len(batch["input_ids"][row]) - length)
        # No answer begins with a BOS: that of the last text stands before <|assistant|>.
        assert PROCESSOR.tokenizer.bos_token_id not in features["input_ids"][trained.index(1) :]
    pictures = [features for features in expected if "pixel_values" in features]
    assert torch.equal(batch["pixel_values"], torch.cat([features["pixel_values"] for features in pictures]))
    assert torch.equal(batch["image_sizes"], torch.cat([features["image_sizes"] for features in pictures]))


CONVERSATIONS = [
    Conversation("a", [Turn("What?", ["1", "one"], [tiny.picture(60, 20)]), Turn("And this?", ["2"], [tiny.picture(9, 9)])]),
    Conversation("b", [Turn("Who?", ["3"])]),
]  # fmt: skip


def test_each_turn_is_a_question_after_those_before_it():
    rows = list(question_dataset(dataset(CONVERSATIONS, lambda row: row)))
    assert [(row["id"], row["question"], row["references"], len(row["images"])) for row in rows] == [
        ("a", "What?", ["1", "one"], 1),
        ("a", "And this?", ["2"], 2),
        ("b", "Who?", ["3"], 0),
    ]
    image = {"type": "image"}
    assert rows[1]["prompt"] == [
        *message("user", "What?", image),
        *message("assistant", "1"),
        *message("user", "And this?", image),
    ]


def test_a_question_with_tags_of_its_own_is_refused():
    tagged = Conversation("a", [Turn("<|image_1|>What?", ["1"], [tiny.picture(9, 9)])])
    with pytest.raises(InputError, match=r"^sample a: expected a question without image tags, found <\|image_1\|>; "):
        question_dataset(dataset([tagged], lambda row: row))


def test_the_processor_of_groups_gives_a_row_of_pixels_for_each_picture_and_ids_as_lists():
    processor = GroupProcessor(PROCESSOR.image_processor, PROCESSOR.tokenizer)
    rows = list(question_dataset(dataset(CONVERSATIONS, lambda row: row)))
    filled = []
    for row in rows[:2]:
        pictures = iter(row["images"])
        parts = [
            [{**part, "image": next(pictures)} if part["type"] == "image" else part for part in item["content"]]
            for item in row["prompt"]
        ]
        filled.append([{**item, "content": content} for item, content in zip(row["prompt"], parts, strict=True)])
    found = processor.apply_chat_template(filled, tokenize=True, return_dict=True, add_generation_prompt=True)
    # three pictures, up to two crops and a global view
    assert found["pixel_values"].shape[:2] == (3, 3)
    assert [type(ids) for ids in found["input_ids"]] == [list, list]
    texts = PROCESSOR.apply_chat_template(filled, add_generation_prompt=True)
    expected = PROCESSOR(texts, [row["images"] for row in rows[:2]], return_tensors=None)
    assert found["input_ids"] == expected["input_ids"]
    assert torch.equal(found["image_sizes"], expected["image_sizes"])


def test_the_reward_of_an_answer_is_the_first_figure_of_the_tasks_score_for_it_alone():
    answers = [[{"role": "assistant", "content": text}] for text in ("1234", "12345", "no")]
    columns = {"id": ["a", "b", "c"], "question": ["?"] * 3, "references": [["1234", "9"]] * 3, "images": [[]] * 3}
    reward = reward_of(load_script("docvqa").score, "docvqa")
    assert reward(prompts=[], completions=answers, completion_ids=[], **columns) == [1.0, 0.8, 0.0]
    for task in ("hateful_memes", "nlvr2", "ucf101"):
        assert reward_of(load_script(task).score, task)(completions=answers, **columns) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("figures", [{}, {"f1": float("nan")}, {"f1": "1"}, 1.0], ids=repr)
def test_a_score_that_gives_no_figure_for_one_answer_is_refused(figures):
    with pytest.raises(InputError, match=r"^--task mine: score: expected a dict whose first value is the figure"):
        reward_of(lambda _: figures, "mine")


@pytest.mark.parametrize("script", [finetune_trl_dpo, finetune_trl_grpo])
def test_without_trl_one_line_says_what_to_install(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(
        InputError, match=r"^TRL: expected it installed, found none; pip install -r requirements-trl.txt$"
    ):
        script.main()


def test_rows_are_dealt_in_another_order_in_each_epoch_and_always_the_same():
    def order(epoch: int, seed: int | None) -> list[int]:
        found = LazyDataset(9, lambda number: number, seed)
        found.start_epoch(epoch)
        assert found.__getitems__([0, 8]) == [found[0], found[8]]
        return list(found)

    assert order(3, None) == list(range(9))
    orders = [order(epoch, seed) for epoch in range(3) for seed in (0, 1)]
    assert all(sorted(found) == list(range(9)) for found in orders)
    assert len(set(map(tuple, orders))) == 6
    assert order(2, 1) == orders[-1]
