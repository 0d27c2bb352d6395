"""What a conversation is known by: each text, choice, answer and picture counts, the place of the data folder does not."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from PIL import Image

from finetuning.data.conversation import Conversation, Turn
from finetuning.data.fingerprint import fingerprint, identify_picture

PARTS = ("prompts", "answers", "pictures")


@pytest.fixture
def folder(tmp_path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(2):
        tiny.picture(30, 20, seed=number).save(data / f"{number}.png")
        os.utime(data / f"{number}.png", (1_000, 1_000))
    return data


def conversation(folder: Path, **changes) -> Conversation:
    first = Turn("What?", ["one", "two"], [str(folder / "0.png"), str(folder / "1.png")], ["one", "two", "three"])
    return Conversation(changes.pop("id", "a"), [replace(first, **changes), Turn("And?", ["three"])])


def changed(before: Conversation, after: Conversation, folder: Path | None = None) -> set[str]:
    known, found = fingerprint(before, folder and str(folder)), fingerprint(after, folder and str(folder))
    return {part for part in PARTS if getattr(known, part) != getattr(found, part)}


def pictures(*sources) -> dict:
    return {"images": list(sources)}


CHANGES = {
    "nothing": (lambda _: {}, set()),
    "the question": (lambda _: {"user": "what?"}, {"prompts"}),
    "white space of the question": (lambda _: {"user": "What? "}, {"prompts"}),
    "a choice": (lambda _: {"choices": ["one", "two", "four"]}, {"prompts"}),
    "no choices": (lambda _: {"choices": []}, {"prompts"}),
    "an answer": (lambda _: {"answers": ["one", "2"]}, {"answers"}),
    "the order of the answers": (lambda _: {"answers": ["two", "one"]}, {"answers"}),
    "an answer more": (lambda _: {"answers": ["one", "two", "2"]}, {"answers"}),
    "two answers in one": (lambda _: {"answers": ["one', 'two"]}, {"answers"}),
    "the order of the pictures": (lambda data: pictures(str(data / "1.png"), str(data / "0.png")), {"pictures"}),
    "a picture less": (lambda data: pictures(str(data / "0.png")), {"pictures"}),
    "the same picture twice": (lambda data: pictures(*[str(data / "0.png")] * 2), {"pictures"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_each_part_is_known_by_itself(folder, case):
    change, parts = CHANGES[case]
    assert changed(conversation(folder), conversation(folder, **change(folder))) == parts


def test_the_id_is_kept_as_it_is(folder):
    assert [fingerprint(conversation(folder, id=name)).id for name in ("a", "b")] == ["a", "b"]
    assert changed(conversation(folder), conversation(folder, id="b")) == set()


def test_what_stands_in_which_turn_counts(folder):
    one, two = Turn("What?", ["yes"]), Turn("And?", ["no"])
    assert changed(Conversation("a", [one, two]), Conversation("a", [two, one])) == {"prompts", "answers"}
    picture = str(folder / "0.png")
    first = Conversation("a", [replace(one, images=[picture]), two])
    second = Conversation("a", [one, replace(two, images=[picture])])
    assert changed(first, second) == {"pictures"}
    # a text moved over the border of two turns
    first = Conversation("a", [Turn("ab", ["x"]), Turn("c", ["x"])])
    second = Conversation("a", [Turn("a", ["x"]), Turn("bc", ["x"])])
    assert changed(first, second) == {"prompts"}


def test_the_text_shows_prompts_and_answers(folder):
    assert fingerprint(conversation(folder)).text == "What? -> one / two\nAnd? -> three"


# ---- pictures


def test_a_file_counts_by_size_and_time(folder):
    known = fingerprint(conversation(folder)).pictures
    path = folder / "1.png"
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, (1_000, 1_000))
    assert fingerprint(conversation(folder)).pictures == known
    os.utime(path, (1_000, 1_001))
    assert fingerprint(conversation(folder)).pictures != known
    path.write_bytes(content + b" ")
    os.utime(path, (1_000, 1_000))
    assert fingerprint(conversation(folder)).pictures != known


def test_a_file_counts_by_its_name(folder):
    shutil.copy2(folder / "0.png", folder / "2.png")
    found = identify_picture(str(folder / "2.png")), identify_picture(str(folder / "0.png"))
    assert found[0][1:] == found[1][1:]
    assert found[0] != found[1]


def test_the_time_counts_to_the_nanosecond(folder):
    path = folder / "0.png"
    os.utime(path, ns=(0, 1_000_000_001))
    known = identify_picture(str(path))
    os.utime(path, ns=(0, 1_000_000_002))
    assert identify_picture(str(path)) != known


@pytest.mark.parametrize("given", ["absolute", "relative", "with a dot", "with a slash at its end"])
def test_a_moved_data_folder_is_the_same_data(folder, tmp_path, monkeypatch, given):
    known = fingerprint(conversation(folder), str(folder))
    moved = tmp_path / "elsewhere" / "deeper"
    moved.parent.mkdir()
    folder.rename(moved)
    monkeypatch.chdir(tmp_path)
    name = {
        "absolute": str(moved),
        "relative": "elsewhere/deeper",
        "with a dot": "./elsewhere/deeper",
        "with a slash at its end": f"{moved}/",
    }[given]
    # as `resolve_images` joins them
    here = Path(os.path.normpath(name))
    assert fingerprint(conversation(here), name) == known
    # without the folder's name the path itself counts
    assert fingerprint(conversation(here)).pictures != known.pictures


def test_a_folder_of_a_like_name_is_another(folder, tmp_path):
    other = tmp_path / "data2"
    shutil.copytree(folder, other)
    assert changed(conversation(folder), conversation(other), folder) == {"pictures"}


@pytest.mark.parametrize("kind", ["path", "Path", "dict with path"])
def test_the_forms_of_a_file_are_the_same_picture(folder, kind):
    path = folder / "0.png"
    source = {"path": str(path), "Path": path, "dict with path": {"bytes": None, "path": str(path)}}.get(kind)
    assert identify_picture(source, str(folder))[0] == "0.png"
    assert identify_picture(source) == identify_picture(str(path))


def test_bytes_count_by_their_content_and_name():
    one = {"bytes": b"abc", "path": "p.png"}
    assert identify_picture(one) == identify_picture(dict(one))
    others = [
        {"bytes": b"abd", "path": "p.png"},
        {"bytes": b"abcd", "path": "p.png"},
        {"bytes": b"abc", "path": "q.png"},
    ]
    assert len({identify_picture(source) for source in [one, *others]}) == 4


def test_a_picture_in_memory_counts_by_its_pixels():
    one = Image.new("RGB", (4, 6), "white")
    assert identify_picture(one) == identify_picture(one.copy())
    pixel = one.copy()
    pixel.putpixel((3, 5), (255, 255, 254))
    # the same bytes in another shape, or as another mode
    other = [pixel, Image.new("RGB", (6, 4), "white"), Image.new("L", (4, 18), "white")]
    assert len({identify_picture(source) for source in [one, *other]}) == 4


def test_a_picture_is_not_decoded(folder):
    path = folder / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    assert identify_picture(str(path))[1] == 60
    image = Image.open(path)
    assert identify_picture(image)[1] == 60


def test_a_picture_that_the_script_has_drawn_on_is_another(folder):
    plain, drawn = Image.open(folder / "0.png"), Image.open(folder / "0.png")
    drawn.paste("red", (0, 0, 5, 5))
    assert identify_picture(plain) != identify_picture(drawn)


def test_a_text_with_half_a_surrogate_pair_has_a_fingerprint():
    # It is refused with a message of its own; to get there must not fail.
    assert fingerprint(Conversation("a", [Turn("\ud800", ["x"])])).prompts
