"""Rows are checked before a model is loaded: what is wrong with them, who says so, which are left out; epochs of the rest."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import recipe
import tiny
from PIL import Image
from torch.utils.data import DataLoader

from finetuning.data import dataset as dataset_module
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import ConversationDataset, StartEpoch, build_dataset
from finetuning.data.encoding import choose_answers, count_tokens, encode_conversation
from finetuning.data.fingerprint import fingerprint
from finetuning.errors import InputError, ScriptError

own_process = pytest.fixture(autouse=True)(recipe.own_process)

PROCESSOR = tiny.processor()
MODULE = "finetuning.data.dataset"


def arguments(**changes) -> SimpleNamespace:
    values = {
        "on_bad_row": "stop",
        "max_bad_rows": None,
        "eval_size": None,
        "data_dir": None,
        "do_train": True,
        "max_length": 300,
        "seed": 0,
    }
    return SimpleNamespace(**{**values, **changes})


class Row(dict):
    """A row that knows where it stands, as those of a jsonl file do."""

    where = "rows.jsonl:1"


def rows(count: int, **special) -> list[Row]:
    """Rows r0, r1, ...; `r3={"answer": None}` changes one."""
    found = []
    for number in range(count):
        row = Row({"id": f"r{number}", "answer": "a" * (1 + number)} | special.get(f"r{number}", {}))
        row.where = f"rows.jsonl:{10 * number + 1}"
        found.append(row)
    return found


def to_conversation(row) -> Conversation:
    return Conversation(row["id"], [Turn("What?", [row["answer"]], row.get("images", []))])


def build(found, function=to_conversation, split="train", **changes) -> ConversationDataset:
    return build_dataset(found, function, PROCESSOR, arguments(**changes), split)


def refusal(*arguments, **changes) -> str:
    with pytest.raises(InputError) as caught:
        build(*arguments, **changes)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def truncated(folder: Path) -> str:
    path = folder / "cut.jpg"
    tiny.picture(200, 200).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    return str(path)


# ---- rows that can be used


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_rank_knows_all_lengths_and_the_first_one_the_fingerprints(monkeypatch, ranks):
    found = rows(4)
    expected = [count_tokens(to_conversation(row), PROCESSOR) for row in found]
    assert len(set(expected)) == 4
    for rank, built in enumerate(recipe.on_ranks(monkeypatch, MODULE, ranks, lambda _: build(found))):
        assert built.lengths == expected
        assert built.rows == found
        assert built.bad_rows == []
        known = [fingerprint(to_conversation(row)) for row in found] if rank == 0 else []
        assert built.fingerprints == known


def test_a_length_is_that_with_the_longest_answers():
    built = build([Row({"id": "a"})], lambda _: Conversation("a", [Turn("What?", ["yes", "a longer answer", "b"])]))
    lengths = {len(built[0]["input_ids"]) for epoch in range(20) if not built.start_epoch(epoch)}
    assert len(lengths) == 3
    assert built.lengths == [max(lengths)]


def test_texts_are_kept_of_the_first_rows_only(monkeypatch):
    monkeypatch.setattr(dataset_module, "ROWS_WITH_TEXT", 2)
    built = build(rows(4))
    assert [known.text for known in built.fingerprints] == ["What? -> a", "What? -> aa", "", ""]
    assert len({known.answers for known in built.fingerprints}) == 4


@pytest.mark.parametrize("kind", ["list", "Dataset"])
def test_eval_size_takes_a_sample_and_train_takes_all(kind):
    datasets = pytest.importorskip("datasets")
    found = rows(5) if kind == "list" else datasets.Dataset.from_list([dict(row) for row in rows(5)])
    for size, expected in ((None, 5), (0, 0), (3, 3), (9, 5)):
        built = build(found, split="eval", eval_size=size)
        assert len({row["id"] for row in built.rows}) == expected
        assert len(built) == len(built.lengths) == len(built.fingerprints) == expected
    assert len(build(found, split="train", eval_size=3)) == 5


def test_rows_that_are_not_answered_are_not_checked():
    asked = {row["id"] for row in build(rows(5), split="eval", eval_size=3).rows}
    (other, *_) = {row["id"] for row in rows(5)} - asked
    assert len(build(rows(5, **{other: {"answer": None}}), split="eval", eval_size=3)) == 3


def test_a_sample_of_a_data_set_is_made_of_its_rows():
    built = build(rows(9), split="eval")
    sample = built.sample(4)
    assert len(sample) == len(sample.lengths) == 4
    places = [row["id"] for row in built.rows]
    numbers = [places.index(row["id"]) for row in sample.rows]
    assert numbers == sorted(set(numbers))
    assert [sample.lengths[place] for place in range(4)] == [built.lengths[number] for number in numbers]
    assert built.sample(9) is built


def test_rows_of_a_data_set_that_decodes_no_images():
    datasets = pytest.importorskip("datasets")
    buffer = io.BytesIO()
    tiny.picture(60, 40).save(buffer, "PNG")
    found = datasets.Dataset.from_list([{"image": {"bytes": buffer.getvalue(), "path": None}, "answers": ["yes"]}])
    found = found.cast_column("image", datasets.Image(decode=False))
    built = build(found, lambda row: Conversation("x", [Turn("What?", row["answers"], [row["image"]])]))
    assert built[0]["image_sizes"].tolist() == [[56, 56]]
    assert json.dumps(built[0]["labels"])


# ---- what load_splits may give


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ((row for row in rows(2)), "generator; list(...) makes one"),
        (map(dict, rows(2)), "map"),
        ({"train": rows(2)}, "dict"),
        ("rows.jsonl", "str"),
        (None, "NoneType"),
        (set(), "set"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_rows_are_a_list_or_a_dataset(found, named):
    message = refusal(found)
    assert message.startswith("load_splits: expected a list or datasets.Dataset of rows to train on, found ")
    assert named in message
    assert "to answer" in refusal(found, split="eval")


def test_a_streamed_data_set_is_refused_with_what_to_do_instead():
    datasets = pytest.importorskip("datasets")
    streamed = datasets.Dataset.from_list([dict(row) for row in rows(2)]).to_iterable_dataset()
    assert refusal(streamed).endswith(
        "found IterableDataset; load_dataset without streaming=True keeps the rows on the disk"
    )


def test_no_rows_to_train_on_are_refused_and_none_to_answer_are_taken():
    assert refusal([]) == "load_splits: expected at least one row to train on, found none"
    assert len(build([], split="eval")) == 0


# ---- rows that cannot be used


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("bad", [(0,), (1, 2), (2, 1, 5), (5,)], ids=str)
def test_the_first_bad_row_is_named_on_every_rank(monkeypatch, ranks, bad):
    found = rows(6, **{f"r{number}": {"answer": None} for number in bad})
    outcomes = recipe.on_ranks(monkeypatch, MODULE, ranks, lambda _: build(found))
    first = min(bad)
    messages = {str(error) for error in outcomes}
    assert {type(error) for error in outcomes} == {InputError}
    (message,) = messages
    assert message.startswith(f"rows.jsonl:{10 * first + 1}: sample r{first}")
    assert "None" in message or "null" in message


def test_a_row_without_a_place_is_named_by_its_number():
    assert refusal([{"id": "a", "answer": "x"}, {"id": "b", "answer": 7}]).startswith("row 2: sample b")


def test_a_sample_that_is_too_long_is_refused_before_training():
    length = build(rows(3)).lengths[2]
    message = refusal(rows(3), max_length=length - 1)
    assert message.startswith("rows.jsonl:21: sample r2: expected at most")
    assert f"found {length}" in message


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_skip_leaves_bad_rows_out_and_names_each(monkeypatch, ranks, capsys):
    found = rows(6, r1={"answer": None}, r4={"answer": " "})
    outcomes = recipe.on_ranks(monkeypatch, MODULE, ranks, lambda _: build(found, on_bad_row="skip", max_bad_rows=2))
    good = [row for row in found if row["id"] not in ("r1", "r4")]
    for built in outcomes:
        assert built.rows == good
        assert built.lengths == [count_tokens(to_conversation(row), PROCESSOR) for row in good]
        assert [(row.split, row.index, row.where) for row in built.bad_rows] == [
            ("train", 1, "rows.jsonl:11"),
            ("train", 4, "rows.jsonl:41"),
        ]
        assert built.skip_bad
    assert [known.id for known in outcomes[0].fingerprints] == ["r0", "r2", "r3", "r5"]
    # said once, not by each rank
    first, second, count = capsys.readouterr().out.splitlines()
    assert first.startswith("skipped: rows.jsonl:11: sample r1")
    assert second.startswith("skipped: rows.jsonl:41: sample r4")
    assert count == "skipped 2 of 6 rows to train on"


def test_skip_leaves_bad_rows_of_a_dataset_out():
    datasets = pytest.importorskip("datasets")
    found = datasets.Dataset.from_list([{"id": f"r{number}", "answer": "x" * (number % 2)} for number in range(4)])
    built = build(found, on_bad_row="skip", max_bad_rows=2)
    assert [row["id"] for row in built.rows] == ["r1", "r3"]


@pytest.mark.parametrize(
    ("count", "bad", "most", "taken"),
    [
        (200, 2, None, True),
        (200, 3, None, False),
        (99, 1, None, False),  # one hundredth is less than one row
        (100, 1, None, True),
        (10, 4, 4, True),
        (10, 4, 3, False),
        (200, 1, 0, False),
        (10, 0, 0, True),
    ],
)
def test_skip_takes_one_bad_row_in_a_hundred_or_as_many_as_are_allowed(count, bad, most, taken):
    found = rows(count, **{f"r{number}": {"answer": None} for number in range(bad)})
    found = [Row({**row, "answer": row["answer"] and "x"}) for row in found]
    if taken:
        assert len(build(found, on_bad_row="skip", max_bad_rows=most)) == count - bad
        return
    message = refusal(found, on_bad_row="skip", max_bad_rows=most)
    allowed = int(count / 100) if most is None else most
    assert message.startswith(
        f"expected at most {allowed} bad rows of {count} to train on, found {bad}, first rows.jsonl:1"
    )
    assert f"--max_bad_rows {bad}" in message


def test_nothing_is_left_to_train_on():
    found = rows(2, r0={"answer": None}, r1={"answer": None})
    message = refusal(found, on_bad_row="skip", max_bad_rows=2)
    assert message.startswith(
        "expected at least one row to train on that can be used, found none: rows.jsonl:1: sample r0"
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_an_id_that_is_used_twice_is_named_with_both_places(monkeypatch, ranks, mode):
    found = rows(6, r4={"id": "r1"}, r5={"id": "r1"})
    outcomes = recipe.on_ranks(monkeypatch, MODULE, ranks, lambda _: build(found, on_bad_row=mode, max_bad_rows=5))
    assert {str(error) for error in outcomes} == {
        "rows.jsonl:41: sample r1: id: expected an id of its own, found that of rows.jsonl:11"
    }


def test_the_two_splits_may_share_ids():
    assert [build(rows(2), split=split).fingerprints[0].id for split in ("train", "eval")] == ["r0", "r0"]


def test_a_bad_row_may_have_the_id_of_a_good_one():
    found = rows(3, r2={"id": "r0", "answer": None})
    assert len(build(found, on_bad_row="skip", max_bad_rows=1)) == 2


# ---- faults of to_conversation


def returns_none(row):
    Conversation(row["id"], [])


def wrong_key(row):
    return Conversation(row["id"], [Turn(row["question"], ["yes"])])


def calls_none(row):
    return Conversation(row["id"], [Turn(clean(row.get("text")), ["yes"])])


def clean(text):
    return text.strip()


def gives_a_list(row):
    return [Conversation(row["id"], [Turn("What?", ["yes"])])]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(("function", "kind"), [(returns_none, "NoneType"), (gives_a_list, "list")])
def test_to_conversation_returns_a_conversation(monkeypatch, function, kind, ranks):
    outcomes = recipe.on_ranks(monkeypatch, MODULE, ranks, lambda _: build(rows(4), function))
    (message,) = {str(error) for error in outcomes}
    assert {type(error) for error in outcomes} == {InputError}
    assert message.startswith("rows.jsonl:1: to_conversation: expected")
    assert kind in message or "null" in message


@pytest.mark.parametrize("mode", ["stop", "skip"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    ("function", "code", "last"),
    [
        (wrong_key, 'return Conversation(row["id"], [Turn(row["question"], ["yes"])])', "KeyError: 'question'"),
        (calls_none, "return text.strip()", "AttributeError: 'NoneType' object has no attribute 'strip'"),
    ],
)
def test_a_fault_of_to_conversation_shows_its_lines_and_the_row(monkeypatch, function, code, last, ranks, mode):
    # As it would be without --on_bad_row: a fault of the code is none of the row's.
    outcomes = recipe.on_ranks(
        monkeypatch, MODULE, ranks, lambda _: build(rows(4), function, on_bad_row=mode, max_bad_rows=9)
    )
    assert {type(error) for error in outcomes} == {ScriptError}
    (text,) = {str(error) for error in outcomes}
    lines = text.splitlines()
    assert lines[0] == f"error in {function.__name__} of test_dataset.py, given rows.jsonl:1 (id r0):"
    line = function.__code__.co_firstlineno + 1
    assert lines[1] == f'  File "{__file__}", line {line}, in {function.__name__}'
    assert code in text
    assert lines[-1] == last
    # no frame of ours, nor of a library
    assert all(__file__ in shown for shown in lines if shown.startswith("  File "))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_first_fault_of_the_script_is_shown(monkeypatch, ranks):
    def function(row):
        if row["id"] in ("r3", "r4"):
            raise ValueError(row["id"])
        return to_conversation(row)

    outcomes = recipe.on_ranks(monkeypatch, MODULE, ranks, lambda _: build(rows(6), function))
    (text,) = {str(error) for error in outcomes}
    assert "given rows.jsonl:31 (id r3):" in text
    assert text.endswith("ValueError: r3")


def test_a_fault_after_a_bad_row_is_met_with_skip_only():
    found = rows(3, r0={"answer": None}, r2={"answer": ""})

    def function(row):
        if row["id"] == "r1":
            raise ValueError("mine")
        return to_conversation(row)

    assert refusal(found, function).startswith("rows.jsonl:1: sample r0")
    with pytest.raises(ScriptError, match="mine"):
        build(found, function, on_bad_row="skip", max_bad_rows=9)


def test_what_the_script_checks_itself_is_a_bad_row():
    def function(row):
        if row["id"] == "r1":
            raise InputError("expected a label, found none")
        return to_conversation(row)

    assert refusal(rows(3), function) == "rows.jsonl:11: expected a label, found none"
    assert len(build(rows(3), function, on_bad_row="skip", max_bad_rows=1)) == 2


@pytest.mark.parametrize("what", ["answer", "prompt", "id"])
def test_another_conversation_each_time_is_refused(what):
    calls = []

    def function(row):
        calls.append(row)
        text = str(len(calls))
        changed = {"answer": text if what == "answer" else "x", "prompt": text if what == "prompt" else "x"}
        identity = text if what == "id" else row["id"]
        return Conversation(identity, [Turn(changed["prompt"], [changed["answer"]])])

    message = refusal(rows(2), function)
    assert message.startswith("rows.jsonl:1: to_conversation: expected the same conversation each time")
    assert "Turn(answers=[...])" in message


# ---- reading for training


def numbered(count: int, answers=lambda number: [f"{number}"], **options) -> ConversationDataset:
    def function(number):
        return Conversation(f"r{number}", [Turn(f"{number}?", answers(number))])

    return ConversationDataset(list(range(count)), function, PROCESSOR, [10] * count, **options)


def answer_of(features: dict) -> str:
    labels = [label for label in features["labels"] if label != -100]
    return PROCESSOR.tokenizer.decode(labels).split("<|end|>")[0]


def test_features_are_those_of_the_conversation():
    built = build(rows(3))
    for index, row in enumerate(built.rows):
        assert built[index] == encode_conversation(to_conversation(row), PROCESSOR)
        assert len(built[index]["input_ids"]) == built.lengths[index]


def test_a_place_without_a_sample_has_no_features():
    assert numbered(2)[None] is None


def test_reading_a_data_set_from_end_to_end_ends():
    # Python iterates until an IndexError; the sampler of --train_sampling_strategy group_by_length does so.
    assert [features["id"] for features in numbered(3)] == ["r0", "r1", "r2"]


def test_a_picture_that_is_damaged_behind_its_header_stops_the_run_or_is_skipped(tmp_path, capsys):
    found = rows(101, r1={"images": [truncated(tmp_path)]})
    found = [Row({**row, "answer": "x"}) for row in found]
    # Decoding every image beforehand would take as long as an epoch; a broken one is met when it is read.
    built = build(found)
    with pytest.raises(InputError, match=r"sample r1.*cut.jpg"):
        built[1]
    built = build(found, on_bad_row="skip")
    assert len(built) == 101
    capsys.readouterr()
    assert built[1] is None
    assert capsys.readouterr().out.startswith("skipped: sample r1, turn 1: ")
    assert built[0]["id"] == "r0"
    # A question that cannot be shown is left out before: else both evaluations would end at it.
    answered = build(found, on_bad_row="skip", split="eval")
    assert [row.index for row in answered.bad_rows] == [1]
    assert len(answered) == 100


def test_a_worker_names_the_sample_it_cannot_read(tmp_path):
    built = build(rows(1, r0={"images": [truncated(tmp_path)]}))
    loader = DataLoader(built, batch_size=None, num_workers=1)
    with pytest.raises(InputError) as caught:
        next(iter(loader))
    # what errors.run_script prints of it
    assert "sample r0" in str(caught.value).strip().splitlines()[-1]


def test_an_error_that_nobody_expected_names_the_sample(monkeypatch):
    def fails(*_):
        raise ZeroDivisionError("by 0")

    built = numbered(2)
    monkeypatch.setattr(dataset_module, "encode_conversation", fails)
    with pytest.raises(RuntimeError, match=r"sample r1 cannot be encoded: ZeroDivisionError\('by 0'\)"):
        built[1]


def test_pictures_in_memory_are_read_again_in_each_epoch():
    picture = Image.new("RGB", (40, 30), "red")
    built = build([Row({"id": "a", "answer": "red", "images": [picture]})])
    first, second = built[0], built[0]
    assert first["pixel_values"].equal(second["pixel_values"])


# ---- epochs


def start_epoch(loader, epoch) -> None:
    StartEpoch().on_epoch_begin(None, SimpleNamespace(epoch=epoch), None, train_dataloader=loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_epoch_reaches_the_loader_workers_that_live_on(workers):
    built = numbered(8, lambda _: ["a", "b", "c", "d"], seed=5)
    loader = DataLoader(built, batch_size=None, num_workers=workers, persistent_workers=bool(workers))
    epochs = []
    for epoch in range(4):
        start_epoch(loader, float(epoch))
        epochs.append([answer_of(features) for features in loader])
        conversations = [built.to_conversation(row) for row in built.rows]
        assert epochs[-1] == [choose_answers(conversation, epoch, 5)[0] for conversation in conversations]
    assert len({tuple(answers) for answers in epochs}) == 4


@pytest.mark.parametrize(("stored", "epoch"), [(None, 0), (0.0, 0), (0.75, 0), (1.0, 1), (2.4, 2)])
def test_a_resumed_run_goes_on_in_its_epoch(stored, epoch):
    built = numbered(3)
    start_epoch(DataLoader(built, batch_size=None), stored)
    assert int(built._epoch) == epoch
