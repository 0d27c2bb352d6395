"""Clips in rows: their frames against those that PyAV decodes, their lengths, and the cache that keeps them."""

import io
import json
import os
import re
import threading
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
import tiny
from clips import make_clip, make_sound, number_in, turn_clip
from PIL import Image

from finetuning import validate
from finetuning.data import clips
from finetuning.data.clips import CLIP_CROPS, Frame, cache_folder, clip_frames, frame_jpeg, most_crops
from finetuning.data.conversation import Conversation, Turn, to_messages
from finetuning.data.encoding import count_tokens, encode_conversation
from finetuning.data.fingerprint import fingerprint
from finetuning.data.frames import frame_indices, read_frames
from finetuning.data.images import image_size, load_image
from finetuning.data.known_forms import known_conversation, locate_pictures
from finetuning.data.own_rows import open_file
from finetuning.data.schemas import ConvertedRow, parse_row
from finetuning.errors import InputError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "awkward_video"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own, and a process that remembers nothing."""
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "assets"))
    for remembered in (clips._jpegs, clips._size, clips._digest, clips._say_once):
        remembered.cache_clear()


def forget() -> None:
    """What a process that starts anew does not know."""
    clips._jpegs.cache_clear()


def entries() -> list[Path]:
    return sorted(path for path in cache_folder().rglob("*") if path.is_file())


def evenly(count: int, num_frames: int) -> list[int]:
    return [int(np.floor(index * count / num_frames)) for index in range(num_frames)]


def numbers(path: Path, num_frames: int = 8) -> list[int]:
    return [number_in(load_image(frame)) for frame in clip_frames(path, num_frames)]


def conversation(*images, text: str = "What is it?") -> Conversation:
    return Conversation("a", [Turn(text, ["this"], list(images))])


@pytest.mark.parametrize("count", [1, 3, 7, 8, 9, 10, 100, 149])
def test_frame_indices_are_even_and_repeat_only_in_a_shorter_clip(count):
    indices = frame_indices(count, 8)
    assert indices == evenly(count, 8)
    assert indices[0] == 0
    assert indices[-1] < count
    assert len(set(indices)) == min(8, count)
    steps = np.diff(indices)
    assert steps.max() - steps.min() <= 1


@pytest.mark.parametrize(("count", "num_frames"), [(40, 8), (40, 3), (9, 8), (3, 8), (1, 4)])
def test_frames_are_those_that_pyav_decodes(tmp_path, count, num_frames):
    clip = make_clip(tmp_path / "a.mp4", count)
    assert numbers(clip, num_frames) == evenly(count, num_frames)
    with av.open(str(clip)) as container:
        decoded = [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]
    for frame, index in zip(clip_frames(clip, num_frames), evenly(count, num_frames), strict=True):
        # from the cache too
        for _ in range(2):
            found = np.asarray(load_image(frame), dtype=float)
            assert ((found - decoded[index]) ** 2).mean() < 255**2 / 10**3.5, "less than 35 dB"
            forget()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("path", sorted(SHARED.glob("*")), ids=lambda path: path.name)
def test_the_awkward_samples(path):
    """Sizes and lengths by the header are those of the frames."""
    processor = tiny.processor(16)
    frames = clip_frames(path, 8)
    assert image_size(frames[0]) == load_image(frames[0]).size
    row = conversation(tiny.picture(100, 60), *frames)
    assert count_tokens(row, processor) == len(encode_conversation(row, processor)["input_ids"])


def test_a_turned_clip_is_upright(tmp_path):
    clip = make_clip(tmp_path / "a.mp4", 8, size=(128, 64))
    turn_clip(clip, 90)
    assert image_size(Frame(str(clip), 0, 8)) == load_image(Frame(str(clip), 0, 8)).size == (64, 128)


def test_frames_take_four_crops_where_pictures_take_more(tmp_path):
    frame, picture = clip_frames(make_clip(tmp_path / "a.mp4", 8, size=(160, 160)), 1)[0], tiny.picture(160, 160)
    assert most_crops([picture, frame], 16) == [16, CLIP_CROPS]
    assert most_crops([picture, frame], 2) == [2, 2]
    processor = tiny.processor(16)
    encoded = encode_conversation(conversation(picture, frame), processor)
    assert encoded["image_sizes"].tolist() == [[4 * tiny.CROP] * 2, [2 * tiny.CROP] * 2]
    alone = tiny.processor(4).image_processor([load_image(frame)])
    assert encoded["pixel_values"][17:].equal(alone["pixel_values"])
    # Tags in another order keep each its crops.
    turned = encode_conversation(conversation(picture, frame, text="<|image_2|> and <|image_1|>"), processor)
    assert turned["image_sizes"].tolist() == encoded["image_sizes"].tolist()[::-1]


def test_a_clip_is_decoded_once_for_all_its_frames_and_all_processes(tmp_path, monkeypatch):
    clip, calls = make_clip(tmp_path / "a.mp4", 20), []
    monkeypatch.setattr("finetuning.data.frames.read_frames", lambda *call: calls.append(call) or read_frames(*call))
    assert numbers(clip) == evenly(20, 8)
    forget()
    (tmp_path / "b.mp4").write_bytes(clip.read_bytes())  # another name, the same content
    assert numbers(tmp_path / "b.mp4") == evenly(20, 8)
    assert len(calls) == len(entries()) == 1
    assert numbers(clip, 5) == evenly(20, 5)
    assert len(calls) == len(entries()) == 2
    # The same name, another content.
    make_clip(clip, 30)
    assert numbers(clip) == evenly(30, 8)
    assert len(entries()) == 3


DAMAGES = {
    "deleted": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "emptied": lambda path: path.write_bytes(b""),
    "a bit changed": lambda path: path.write_bytes(
        bytes(byte ^ (number == 300) for number, byte in enumerate(path.read_bytes()))
    ),
    "another archive": lambda path: zipfile.ZipFile(path, "w").close(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_deleted_entry_is_made_again(tmp_path, damage):
    clip = make_clip(tmp_path / "a.mp4", 20)
    before = [frame_jpeg(frame) for frame in clip_frames(clip, 8)]
    [entry] = entries()
    whole = zipfile.ZipFile(entry).infolist()[0].CRC
    DAMAGES[damage](entry)
    forget()
    assert [frame_jpeg(frame) for frame in clip_frames(clip, 8)] == before
    assert entries() == [entry]
    assert whole == zipfile.ZipFile(entry).infolist()[0].CRC


def test_the_cache_is_bounded_and_keeps_what_was_used_last(tmp_path, monkeypatch):
    made = [make_clip(tmp_path / f"{count}.mp4", count) for count in (10, 11, 12, 13)]
    frame_jpeg(Frame(str(made[0]), 0, 8))
    size = entries()[0].stat().st_size
    monkeypatch.setattr(clips, "FOLDERS", 1)
    monkeypatch.setattr(clips, "MOST_BYTES", 3.5 * size)
    for path in entries():
        path.unlink()
    forget()
    for number, path in enumerate(made[:3]):
        frame_jpeg(Frame(str(path), 0, 8))
        os.utime(entries_of(path), ns=(number, number))
    forget()
    frame_jpeg(Frame(str(made[0]), 0, 8))  # used again
    frame_jpeg(Frame(str(made[3]), 0, 8))
    assert entries() == sorted(map(entries_of, (made[0], made[2], made[3])))
    assert sum(path.stat().st_size for path in entries()) <= 3.5 * size
    monkeypatch.setattr(clips, "MOST_BYTES", 10)  # too small for any
    forget()
    assert numbers(made[1]) == evenly(11, 8)


def entries_of(path: Path) -> Path:
    return clips._entry(clips._digest(clips._look_at(str(path))), 8)


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "file"))
    for count in (20, 21):
        assert numbers(make_clip(tmp_path / f"{count}.mp4", count)) == evenly(count, 8)
    assert len(re.findall("warning: .*decoded each time", capsys.readouterr().out)) <= 2


def test_many_at_once_give_the_same_and_leave_nothing_aside(tmp_path):
    clip, found = make_clip(tmp_path / "a.mp4", 20), []

    def read():
        for _ in range(5):
            found.append(clips._jpegs.__wrapped__(clips._look_at(str(clip)), 8))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(jpegs == found[0] for jpegs in found)
    assert len(entries()) == 1


def bad_clips(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.mp4").touch()
    (folder / "folder.mp4").mkdir()
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    cut = make_clip(folder / "cut.mp4", 20)
    cut.write_bytes(cut.read_bytes()[:500])
    frames = "expected a video of which frames decode, found: "
    return {
        "missing": (folder / "none.mp4", "expected a video file, found no such file"),
        "a folder": (folder / "folder.mp4", "expected a video file, found a directory"),
        "empty": (folder / "empty.mp4", frames + "Invalid data found"),
        "text": (folder / "text.mp4", frames + "Invalid data found"),
        "cut": (cut, frames + "Invalid data found"),
        "sound alone": (make_sound(folder / "sound.mp4"), frames + "no video stream"),
    }


def test_a_clip_that_cannot_be_used_is_one_line(tmp_path):
    processor = tiny.processor()
    for name, (path, message) in bad_clips(tmp_path).items():
        row = conversation(*clip_frames(path, 8))
        for function in (count_tokens, encode_conversation):
            with pytest.raises(InputError) as error:
                function(row, processor)
            assert str(error.value).startswith(f"sample a, turn 1: images[0]: {path}"), name
            assert message in str(error.value), name
            assert "\n" not in str(error.value)


def test_a_clip_of_too_many_pixels_is_refused_by_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr("finetuning.data.images.pixel_limit", lambda: 1000)
    with pytest.raises(InputError, match=r"expected at most 1000 pixels \(--max_image_pixels\), found 128 x 64"):
        image_size(Frame(str(make_clip(tmp_path / "a.mp4", 8)), 0, 8))


def test_a_run_notices_another_clip_and_another_number_of_frames(tmp_path):
    clip = make_clip(tmp_path / "a.mp4", 8)
    known = fingerprint(conversation(*clip_frames(clip, 4)), str(tmp_path))
    assert fingerprint(conversation(*clip_frames(clip, 4)), str(tmp_path)) == known
    assert fingerprint(conversation(*clip_frames(clip, 5)), str(tmp_path)).pictures != known.pictures
    assert fingerprint(conversation(*clip_frames(clip, 5)[:4]), str(tmp_path)).pictures != known.pictures
    make_clip(clip, 9)
    assert fingerprint(conversation(*clip_frames(clip, 4)), str(tmp_path)).pictures != known.pictures


FORMS = {
    "question": {"video": "clip.mp4", "question": "What?", "answer": "x"},
    "question with a list": {"videos": ["clip.mp4"], "question": "<video>What?", "answer": "x"},
    "native": {"conversations": [{"video": "clip.mp4", "user": "What?", "assistant": "x"}]},
    "LLaVA": {"video": "clip.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "x"}]},
    "LLaVA-Video": {
        "video": "clip.mp4",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}],
    },
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "x"},
        ]
    },
    "messages beside a list": {
        "videos": ["clip.mp4"],
        "messages": [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "x"},
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_clip_stands_in_a_row_of_any_form(tmp_path, form):
    row = known_conversation(locate_pictures({"id": "a", **FORMS[form]}, tmp_path, 2))
    assert row.images == clip_frames(tmp_path / "clip.mp4", 2)
    [message, _] = to_messages(row, ["x"])
    assert message["content"].replace("\n", "") == "<|image_1|><|image_2|>What?"
    assert message["content"].startswith("<|image_1|>\n<|image_2|>")


def test_clips_and_pictures_stand_where_their_marks_are(tmp_path):
    row = {"id": "a", "video": "b.mp4", "image": "c.png", "question": "<image> after <video>", "answer": "x"}
    found = known_conversation(locate_pictures(row, tmp_path, 2))
    assert found.turns[0].user == "<|image_1|> after <|image_2|>\n<|image_3|>"
    assert found.images == [str(tmp_path / "c.png"), *clip_frames(tmp_path / "b.mp4", 2)]


SAYS = {"role": "assistant", "content": "x"}
BAD_ROWS = [
    ({"video": "../b.mp4", "question": "?", "answer": "x"}, "video: expected a path inside"),
    ({"video": "http://x/b.mp4", "question": "?", "answer": "x"}, "video: expected a path of a clip, found 'http"),
    ({"video": 3, "question": "?", "answer": "x"}, "sample a: video: expected the path of a clip, found 3"),
    ({"messages": [{"role": "user", "content": "<video> ?"}, SAYS]}, "expected 0 placeholder(s) <video> for 0 clip(s), found 1"),
    ({"video": "b.mp4", "messages": [{"role": "user", "content": "?"}, SAYS]}, "expected 1 placeholder(s) <video> for 1 clip(s), found 0"),
    ({"video": "b.mp4", "messages": [{"role": "user", "content": "<image> <image>"}, SAYS]}, "expected 1 placeholder(s) <image> for 1 clip(s), found 2"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}, SAYS]}, "expected a path, file:// or data: in the part of type video, found none"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_row_whose_clip_does_not_fit_is_one_line(tmp_path, row, message):
    with pytest.raises(InputError) as error:
        known_conversation(locate_pictures({"id": "a", **row}, tmp_path, 2))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_script_without_clips_says_which_one_takes_them():
    row = {"id": "a", "conversations": [{"video": "b.mp4", "user": "?", "assistant": "x"}]}
    with pytest.raises(InputError, match="found a clip, which finetune_hf_trainer_own_data.py reads"):
        parse_row(row, ConvertedRow)


def test_validate_reads_clips_and_converts_them_to_their_frames(tmp_path, capsys):
    make_clip(tmp_path / "data/clip.mp4", 20)
    (tmp_path / "data/train.jsonl").write_text(json.dumps({"id": "a", **FORMS["native"]}) + "\n")
    (tmp_path / "data/test.jsonl").write_text(json.dumps({"id": "b", "question": "Why?", "answer": "y"}) + "\n")
    call = [str(tmp_path / "data"), "--model_name_or_path", str(tmp_path), "--num_frames", "3"]
    assert validate.main([*call, "--convert", str(tmp_path / "out")]) == 0, capsys.readouterr()
    [row] = [json.loads(line) for line in (tmp_path / "out/converted_train.jsonl").read_text().splitlines()]
    [turn] = row["conversations"]
    assert turn == {"images": [f"clip.mp4.{n}.jpg" for n in range(3)], "user": "What?", "assistant": "x"}
    shown = [number_in(Image.open(tmp_path / "out/images" / name)) for name in turn["images"]]
    assert shown == evenly(20, 3)


def test_a_column_of_clips_that_is_called_otherwise_is_told(tmp_path):
    (tmp_path / "a.csv").write_text("path,question,answer\nclips/a.mp4,What?,x\n")
    with pytest.raises(
        InputError,
        match=r"a\.csv:2: expected clips in a column video or videos, found them in 'path'; --columns video=path",
    ):
        open_file(tmp_path / "a.csv", {}, 8)
    [row] = open_file(tmp_path / "a.csv", {"video": "path"}, 3)
    assert known_conversation(row).images == clip_frames(tmp_path / "clips/a.mp4", 3)
