"""Rows dealt into parts: pages stay together, parts are equal, the same for the same rows."""

import shutil

import recipe

import finetune_hf_trainer_docvqa as docvqa
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.folds import deal_rows
from finetuning.data.reading import read_splits
from finetuning.errors import InputError


def test_questions_about_one_page_stay_together_wherever_the_folder_lies(tmp_path):
    folder = recipe.docvqa_rows(tmp_path / "data", train=9, test=0)
    rows = [row | {"id": f"{row['id']}-{copy}"} for copy in range(3) for row in read_splits(folder, None, "train")[1]]
    found = deal_rows(rows, docvqa.to_conversation, 2)
    assert [name for name, _ in found] == [row["id"] for row in rows]
    parts = [part for _, part in found]
    assert parts[:9] == parts[9:18] == parts[18:]
    assert sorted((parts.count(0), parts.count(1))) == [12, 15]
    shutil.move(folder, tmp_path / "moved")
    moved = [
        row | {"id": f"{row['id']}-{copy}"}
        for copy in range(3)
        for row in read_splits(tmp_path / "moved", None, "train")[1]
    ]
    assert deal_rows(moved, docvqa.to_conversation, 2) == found


def test_rows_without_pictures_go_by_their_text_and_unreadable_ones_nowhere():
    def to_conversation(text: str) -> Conversation:
        if text == "bad":
            raise InputError("a row that cannot be used")
        return Conversation(text, [Turn(text[0], ["x"])])

    found = dict(deal_rows(["a1", "b1", "a2", "bad", "c1", "d1"], to_conversation, 3))
    assert found[""] == -1
    assert found["a1"] == found["a2"]
    assert {found[name] for name in ("a1", "b1", "c1", "d1")} == {0, 1, 2}
