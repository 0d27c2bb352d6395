"""Rows that a run got wrong, to ask again: which ones, with what, and where data or report are gone."""

import json

import made_run
import pytest
import recipe
from PIL import Image

from finetuning.data.clips import clip_frames
from finetuning.errors import InputError
from finetuning.results.examples import copy_picture, join_examples, wrong_rows


def leave_report(folder, found, after="answer"):
    folder.mkdir()
    made_run.leave(folder, found, {"before": "x", "after": lambda turn: turn[after]})
    made_run.report(folder, found)
    return folder


def read_rows(found):
    return lambda _: (found, made_run.to_conversation)


def test_the_wrong_rows_stand_with_their_pictures_and_both_answers(tmp_path):
    found = made_run.rows(6)
    folder = leave_report(tmp_path / "run", found)
    examples = wrong_rows(folder, read_rows(found))
    assert [item.id for item in examples] == ["r1", "r3", "r5"]
    assert examples[1].answers == {"run": "2"}
    assert examples[1].turn.answers == ["3"]
    assert examples[1].turn.images == found[3]["images"]
    assert examples[1].thumbnail.startswith("data:image/webp")
    assert examples[1].earlier == []


def test_earlier_turns_come_with_the_answers_that_were_shown(tmp_path):
    turns = [
        {"question": "First?", "references": ["a", "b"], "answer": "b", "images": [recipe.page("1")]},
        {"question": "Second?", "references": ["c"], "answer": "d"},
    ]
    found = [{"id": "r", "turns": turns}]
    (example,) = wrong_rows(leave_report(tmp_path / "run", found), read_rows(found))
    assert example.turn.user == "Second?"
    assert [(turn.user, turn.answers, turn.images) for turn in example.earlier] == [
        ("First?", ["a"], turns[0]["images"])
    ]


def test_a_row_that_is_gone_or_was_changed_is_left_out_and_one_that_has_moved_is_found(tmp_path):
    found = made_run.rows(8)
    folder = leave_report(tmp_path / "run", found)
    now = [row for row in found if row["id"] != "r3"]
    now[now.index(found[5])] = {**found[5], "question": "Which book?"}
    assert [item.id for item in wrong_rows(folder, read_rows(now))] == ["r1", "r7"]


def test_a_row_that_several_runs_got_wrong_stands_once(tmp_path):
    found = [{**row, "other": row["references"][0] if row["id"] == "r1" else "z"} for row in made_run.rows(4)]
    one = wrong_rows(leave_report(tmp_path / "one", found), read_rows(found))
    other = wrong_rows(leave_report(tmp_path / "other", found, "other"), read_rows(found))
    joined = {item.id: item.answers for item in join_examples([one, other])}
    assert joined == {"r1": {"one": "0"}, "r3": {"one": "2", "other": "z"}, "r0": {"other": "z"}, "r2": {"other": "z"}}


def test_a_folder_without_a_report_says_so(tmp_path):
    with pytest.raises(InputError, match="report.html of a finished run"):
        wrong_rows(tmp_path, read_rows([]))
    folder = leave_report(tmp_path / "run", made_run.rows(2))
    (folder / "run.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match="report.html of a finished run"):
        wrong_rows(folder, read_rows([]))


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_is_copied_as_it_is(tmp_path, name):
    path = tmp_path / "source"
    recipe.page("1").save(path, name)
    for source in (path, str(path), {"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}):
        copied = copy_picture(source, tmp_path / "copy")
        assert copied.read_bytes() == path.read_bytes()
        assert copied.suffix in {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "TIFF": ".tif"}[name]
    clip = copy_picture(clip_frames(path, 2)[0], tmp_path / "clip")
    assert (clip.name, clip.read_bytes()) == ("clip", path.read_bytes())
    with Image.open(copy_picture(recipe.page("1"), tmp_path / "held")) as held:
        assert held.tobytes() == recipe.page("1").tobytes()
