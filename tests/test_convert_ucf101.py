"""convert_ucf101.py on clips whose frames show their own number, see clips.py."""

import fcntl
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from pathlib import Path, PurePosixPath

import av
import numpy as np
import pytest
from clips import make_clip, make_sound, number_in, turn_clip
from PIL import Image

import convert_ucf101
from finetuning.errors import InputError

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")


def shown_number(image: Path) -> int:
    """The number that a converted frame shows."""
    return number_in(Image.open(image))


def taken(out_dir: Path, target: str, num_frames: int = 8) -> list[int]:
    assert not (out_dir / "images" / f"{target}.{num_frames}.jpg").exists()
    return [shown_number(out_dir / "images" / f"{target}.{index}.jpg") for index in range(num_frames)]


def evenly(count: int, num_frames: int = 8) -> list[int]:
    return [int(np.floor(index * count / num_frames)) for index in range(num_frames)]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(out_dir: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (out_dir / f"ucf101_{split}.jsonl").read_text().splitlines()]


def pack(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return archive


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the script in this process, its one worker in another, and returns what it printed."""

    def call(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["convert_ucf101.py", "--workers", "1", *map(str, arguments)])
        convert_ucf101.main()
        return capsys.readouterr().out

    return call


def command(*arguments, **environment) -> subprocess.CompletedProcess:
    call = [sys.executable, "convert_ucf101.py", *map(str, arguments)]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """UCF_subset/{train,val,test} of two classes: 2, 1 and 1 clips each."""
    folder = tmp_path_factory.mktemp("clips") / "UCF_subset"
    for label, count in (("Bowling", 40), ("Archery", 23)):
        for number, split in enumerate(("train", "train", "val", "test"), 1):
            make_clip(folder / split / label / f"v_{label}_g{number:02d}_c01.avi", count + number)
    return folder


# What is written


def test_folder_and_lines_are_those_of_the_recipe(convert, clips, tmp_path):
    said = convert("--out_dir", tmp_path, "--video_dir", clips)
    images = {
        f"images/{split}/{label}/v_{label}_g{number:02d}_c01.{index}.jpg"
        for number, split in enumerate(("train", "train", "val", "test"), 1)
        for label in ("Archery", "Bowling")
        for index in range(8)
    }
    jsonl = {f"ucf101_{split}.jsonl" for split in ("train", "val", "test")}
    assert set(tree(tmp_path)) == images | jsonl | {".convert_ucf101.json"}
    assert not (tmp_path / ".partial").exists()
    assert "train 4, val 2, test 2" in said

    paths = ", ".join(f'"val/Archery/v_Archery_g03_c01.{index}.jpg"' for index in range(8))
    assert (tmp_path / "ucf101_val.jsonl").read_text().splitlines()[0] == (
        f'{{"id": "val-0000000004", "source": "ucf101", "conversations": [{{"images": [{paths}], "user": '
        '"Classify the video into one of the following classes: Archery, Bowling.", "assistant": "Archery"}]}'
    )
    # In the recipe 10 classes have 30 train clips each, and the first val clip is number 300: ids count over all splits.
    ids = [row["id"] for split in ("train", "val", "test") for row in rows(tmp_path, split)]
    names = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    assert ids == [f"{split}-{number:010d}" for number, split in enumerate(names)]
    for split in ("train", "val", "test"):
        for row in rows(tmp_path, split):
            (turn,) = row["conversations"]
            assert all((tmp_path / "images" / path).is_file() for path in turn["images"])
            assert all(path.startswith(f"{split}/{turn['assistant']}/") for path in turn["images"])
    assert taken(tmp_path, "train/Archery/v_Archery_g01_c01") == evenly(24)
    assert taken(tmp_path, "test/Bowling/v_Bowling_g04_c01") == evenly(44)


def test_archive_and_folder_and_any_number_of_workers_give_the_same_bytes(convert, clips, tmp_path):
    convert("--out_dir", tmp_path / "folder", "--video_dir", clips)
    archive = pack(clips, tmp_path / "clips.tar.gz")
    convert("--out_dir", tmp_path / "archive", "--archive", archive, "--workers", 3)
    assert tree(tmp_path / "folder") == tree(tmp_path / "archive")
    assert len(tree(tmp_path / "folder")) == 8 * 8 + 4


def test_frames_keep_their_size_and_look_as_decoded(convert, tmp_path):
    clip = make_clip(tmp_path / "in/A/a.mkv", 9, size=(200, 120))
    convert("--out_dir", tmp_path / "fine", "--video_dir", tmp_path / "in", "--num_frames", 3)
    convert("--out_dir", tmp_path / "coarse", "--video_dir", tmp_path / "in", "--num_frames", 3, "--quality", 20)
    with av.open(str(clip)) as container:
        frame = list(container.decode(video=0))[3].to_ndarray(format="rgb24").astype(float)
    errors = {}
    for name in ("fine", "coarse"):
        assert taken(tmp_path / name, "train/A/a", 3) == [0, 3, 6]
        image = Image.open(tmp_path / name / "images/train/A/a.1.jpg")
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (200, 120))
        errors[name] = ((np.asarray(image) - frame) ** 2).mean()
    assert errors["fine"] < 255**2 / 10**3.8, "less than 38 dB"
    assert errors["coarse"] > 2 * errors["fine"]


# Clips that are not what their header says


def set_avi_header_count(path: Path, count: int) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"strh") + 40, count)
    path.write_bytes(data)


@pytest.mark.parametrize("claimed", [4, 0, 5000])
def test_the_count_in_the_header_is_not_trusted(tmp_path, claimed):
    clip = make_clip(tmp_path / "a.avi", 30)
    set_avi_header_count(clip, claimed)
    with av.open(str(clip)) as container:
        assert container.streams.video[0].frames == claimed
    (tmp_path / "partial").mkdir()
    result = convert_ucf101.convert_clip(clip, tmp_path / "images/a", 8, 92, tmp_path / "partial")
    assert result == ("", "")
    assert taken(tmp_path, "a") == evenly(30)


def test_awkward_clips(convert, tmp_path):
    folder = tmp_path / "in" / "train" / "A"
    vfr = make_clip(folder / "vfr.mkv", 50, gap=lambda number: 1 + 5 * (number % 3))
    with av.open(str(vfr)) as container:
        assert container.streams.video[0].frames == 0
    make_clip(folder / "one.avi", 1)
    make_clip(folder / "three.mp4", 3)
    whole = make_clip(folder / "truncated.avi", 120)
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    title = make_clip(folder / "title.avi", 16)
    title.write_bytes(title.read_bytes().replace(b"TITLE", b"\xff\xfe\xe9\x80!"))
    with pytest.raises(UnicodeDecodeError):
        av.open(str(title))
    hole = make_clip(folder / "hole.avi", 60)
    data = bytearray(hole.read_bytes())
    start = [index for index in range(len(data)) if data[index : index + 4] == b"00dc"][20]
    data[start + 8 : start + 16] = bytes(8)  # The start of one frame.
    hole.write_bytes(data)

    said = convert("--out_dir", tmp_path, "--video_dir", tmp_path / "in")
    assert taken(tmp_path, "train/A/vfr") == evenly(50)
    assert taken(tmp_path, "train/A/one") == [0] * 8
    assert taken(tmp_path, "train/A/three") == [0, 0, 0, 1, 1, 1, 2, 2]
    assert taken(tmp_path, "train/A/title") == evenly(16)
    with av.open(str(whole)) as container:
        count = sum(1 for _ in container.decode(video=0))
    assert 40 < count < 110
    numbers = taken(tmp_path, "train/A/truncated")
    assert numbers == evenly(count)
    assert len(set(taken(tmp_path, "train/A/hole"))) == 8
    assert "three.mp4: only 3 of 8 frames, so some are repeated" in said
    assert "one.avi: only 1 of 8 frames, so some are repeated" in said
    assert said.count("repeated") == 2
    assert "not decoded: 0" in said


@pytest.mark.parametrize(("degrees", "corner"), [(90, (0, -1)), (180, (-1, -1)), (270, (-1, 0))])
def test_rotation_is_honoured(tmp_path, degrees, corner):
    # Frame 1 is white on the left only; its upper left corner goes where a clockwise turn takes it.
    clip, size = make_clip(tmp_path / "a.mp4", 8, size=(128, 64)), (128, 64)
    turn_clip(clip, degrees)
    (tmp_path / "partial").mkdir()
    assert convert_ucf101.convert_clip(clip, tmp_path / "a", 8, 92, tmp_path / "partial") == ("", "")
    image = Image.open(tmp_path / "a.1.jpg").convert("L")
    assert image.size == (size if degrees == 180 else size[::-1])
    pixels = np.asarray(image)
    assert pixels[corner] > 200
    assert (pixels > 127).mean() == pytest.approx(1 / 8, abs=0.02)
    # The white column is now the row or column at that edge.
    edge = {90: pixels[0], 180: pixels[:, -1], 270: pixels[-1]}[degrees]
    assert edge.min() > 200


def test_spaces_unicode_and_bytes_that_are_not_utf8_in_names(convert, tmp_path):
    label, odd = "Ballet dance, ünï 跑步", os.fsdecode(b"clip \xff")
    make_clip(tmp_path / "in" / "train" / label / "a b.é.mp4", 8)
    make_clip(tmp_path / "plain.avi", 12).rename(tmp_path / "in" / "train" / label / f"{odd}.AVI")
    convert("--out_dir", tmp_path / "out", "--video_dir", tmp_path / "in")
    convert("--out_dir", tmp_path / "again", "--archive", pack(tmp_path / "in", tmp_path / "in.tar.gz"))
    assert tree(tmp_path / "out") == tree(tmp_path / "again")
    found = rows(tmp_path / "out", "train")
    assert [row["conversations"][0]["assistant"] for row in found] == [label] * 2
    assert found[0]["conversations"][0]["user"].endswith(f"following classes: {label}.")
    assert found[1]["conversations"][0]["images"][7] == f"train/{label}/{odd}.7.jpg"
    for row in found:
        assert all((tmp_path / "out/images" / path).is_file() for path in row["conversations"][0]["images"])
    assert taken(tmp_path / "out", f"train/{label}/{odd}") == evenly(12)


# Clips that do not decode


def test_a_bad_clip_is_listed_and_the_exit_status_says_so(clips, tmp_path):
    shutil.copytree(clips, tmp_path / "in")
    bad = tmp_path / "in/train/Archery/v_Archery_g01_c01.avi"
    bad.write_bytes(b"not a video" * 100)
    result = command("--out_dir", tmp_path / "out", "--video_dir", tmp_path / "in")
    assert result.returncode == 2
    assert "not decoded: train/Archery/v_Archery_g01_c01.avi: Invalid data" in result.stdout
    assert "100%" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: expected every clip to decode, found 1 that did not")
    # The others are there, and the bad clip keeps its number.
    assert [row["id"][-1] for row in rows(tmp_path / "out", "train")] == ["1", "2", "3"]
    result = command("--out_dir", tmp_path / "out", "--video_dir", tmp_path / "in", "--skip_bad")
    assert result.returncode == 0, result.stderr
    assert "not decoded: train/Archery/v_Archery_g01_c01.avi: Invalid data" in result.stdout
    # Once it is repaired the result is what it would have been.
    shutil.copy(clips / "train/Archery/v_Archery_g01_c01.avi", bad)
    result = command("--out_dir", tmp_path / "out", "--video_dir", tmp_path / "in")
    assert (result.returncode, "1 of them new" in result.stdout) == (0, True)
    assert len(rows(tmp_path / "out", "train")) == 4
    assert taken(tmp_path / "out", "train/Archery/v_Archery_g01_c01") == evenly(24)


def test_sound_without_pictures_is_a_bad_clip(tmp_path):
    make_sound(tmp_path / "a.mp4")
    (tmp_path / "partial").mkdir()
    note, fault = convert_ucf101.convert_clip(tmp_path / "a.mp4", tmp_path / "a", 8, 92, tmp_path / "partial")
    assert (note, fault) == ("", "no video stream")
    assert not list(tmp_path.glob("*.jpg"))


# Running again


def test_a_second_run_does_only_what_is_missing(convert, clips, tmp_path):
    convert("--out_dir", tmp_path, "--video_dir", clips)
    before = tree(tmp_path)
    times = {path: (tmp_path / path).stat().st_mtime_ns for path in before if path.endswith(".jpg")}
    (tmp_path / "images/val/Bowling/v_Bowling_g03_c01.5.jpg").unlink()
    said = convert("--out_dir", tmp_path, "--video_dir", clips)
    assert "1 of them new" in said
    assert tree(tmp_path) == before
    written = {path for path, old in times.items() if (tmp_path / path).stat().st_mtime_ns != old}
    assert written == {f"images/val/Bowling/v_Bowling_g03_c01.{index}.jpg" for index in range(8)}
    assert "0 of them new" in convert("--out_dir", tmp_path, "--video_dir", clips)


def test_other_settings_or_another_clip_are_done_again(convert, clips, tmp_path):
    shutil.copytree(clips / "train", tmp_path / "in/train")
    arguments = ("--out_dir", tmp_path / "out", "--video_dir", tmp_path / "in")
    convert(*arguments)
    fresh = tree(tmp_path / "out")
    convert(*arguments, "--num_frames", 4, "--quality", 50)
    assert len(tree(tmp_path / "out")) == 4 * 4 + 2
    assert taken(tmp_path / "out", "train/Archery/v_Archery_g01_c01", 4) == evenly(24, 4)
    convert(*arguments)
    assert tree(tmp_path / "out") == fresh
    make_clip(tmp_path / "in/train/Archery/v_Archery_g01_c01.avi", 99)
    assert "1 of them new" in convert(*arguments)
    assert taken(tmp_path / "out", "train/Archery/v_Archery_g01_c01") == evenly(99)


def workers_of(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.parametrize(("victim", "source"), [("main process", "archive"), ("worker", "video_dir")])
def test_killed_half_way_and_run_again_equals_an_undisturbed_run(many_clips, undisturbed, tmp_path, source, victim):
    given = many_clips if source == "video_dir" else pack(many_clips, tmp_path / "clips.tar.gz")
    out = tmp_path / "out"
    call = [sys.executable, "convert_ucf101.py", "--out_dir", out, f"--{source}", given, "--workers", "1"]
    process = subprocess.Popen(call, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(list(out.glob("images/*/*/*.jpg"))) < 11:
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid if victim == "main process" else workers_of(process.pid)[0], signal.SIGKILL)
    errors = process.communicate(timeout=30)[1]
    if victim == "worker":
        assert process.returncode == 2
        assert errors.splitlines()[-1].startswith("error: expected every worker to finish, found one killed")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # No process stays behind.
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("a worker outlived the main process")
    found = {path: data for path, data in tree(out).items() if not path.startswith(".partial")}
    assert 11 <= sum(path.endswith(".jpg") for path in found) < 8 * 40
    assert not any(path.endswith(".jsonl") for path in found)
    assert all(undisturbed[path] == data for path, data in found.items()), "a file was not whole"
    result = command("--out_dir", out, f"--{source}", given, "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert tree(out) == undisturbed


@pytest.fixture(scope="module")
def many_clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "clips"
    clip = make_clip(folder / "A" / "v_A_g00_c00.avi", 60, size=(320, 240))
    for number in range(1, 40):
        shutil.copy(clip, folder / "A" / f"v_A_g{number // 4:02d}_c{number % 4:02d}.avi")
    return folder


@pytest.fixture(scope="module")
def undisturbed(many_clips, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert command("--out_dir", out, "--video_dir", many_clips).returncode == 0
    return tree(out)


def test_two_runs_in_one_folder_do_not_mix(convert, clips, tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="found another at work"):
        convert("--out_dir", tmp_path, "--video_dir", clips)
    os.close(folder)


# Archives


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, data


HOSTILE = {
    "up": [member("../A/evil.avi", data=b"evil")],
    "up inside": [member("A/../../evil.avi", data=b"evil")],
    "folder up": [member("../A", tarfile.DIRTYPE)],
    "absolute": [member("/tmp/A/evil.avi", data=b"evil")],
    "symlink": [member("A/evil.avi", tarfile.SYMTYPE, "/etc/passwd")],
    "symlink inside": [member("A/evil.avi", tarfile.SYMTYPE, "good.avi")],
    "symlink to a folder, then a file in it": [
        member("A", tarfile.SYMTYPE, "/tmp"),
        member("A/evil.avi", data=b"evil"),
    ],
    "hardlink": [member("A/evil.avi", tarfile.LNKTYPE, "A/good.avi")],
    "character device": [member("A/evil.avi", tarfile.CHRTYPE)],
    "block device": [member("A/evil.avi", tarfile.BLKTYPE)],
    "fifo": [member("A/evil.avi", tarfile.FIFOTYPE)],
    "twice": [member("A/evil.avi", data=b"evil"), member("A/evil.avi", data=b"two")],
    "twice, written in two ways": [member("A/evil.avi", data=b"evil"), member("./A//evil.avi", data=b"two")],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_archive_is_refused_before_anything_is_written(convert, clips, tmp_path, members):
    good = (clips / "train/Archery/v_Archery_g01_c01.avi").read_bytes()
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for info, data in [member("A/good.avi", data=good), *members]:
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(InputError, match="expected folders and files inside the archive, found") as error:
        convert("--out_dir", tmp_path / "deep" / "out", "--archive", tmp_path / "a.tar.gz")
    assert repr(members[-1][0].name) in str(error.value) or repr(members[0][0].name) in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize("damage", ["half", "text", "missing", "folder"])
def test_an_archive_that_cannot_be_read_is_one_line(convert, clips, tmp_path, damage):
    archive = pack(clips, tmp_path / "a.tar.gz")
    if damage == "half":
        archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    elif damage == "text":
        archive.write_text("not an archive")
    else:
        archive = tmp_path / "other"
        if damage == "folder":
            archive.mkdir()
    with pytest.raises(InputError, match=r"expected a whole \.tar\.gz, found: .+; fetch or pack it again"):
        convert("--out_dir", tmp_path / "out", "--archive", archive)
    assert not (tmp_path / "out").exists()


def test_the_subset_comes_from_the_hub(clips, tmp_path):
    """The hub's cache holds the archive, as after a download; no network is used."""
    offline = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    result = command("--out_dir", tmp_path / "out", **offline)
    assert result.returncode == 2
    assert result.stderr.startswith("error: sayakpaul/ucf101-subset: UCF101_subset.tar.gz: expected it from ")
    assert len(result.stderr.splitlines()) == 1

    commit = "0" * 40
    repository = tmp_path / "hub" / "hub" / "datasets--sayakpaul--ucf101-subset"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    pack(clips, repository / "snapshots" / commit / "UCF101_subset.tar.gz")
    result = command("--out_dir", tmp_path / "out", **offline)
    assert result.returncode == 0, result.stderr
    assert len(rows(tmp_path / "out", "train")) == 4


# Folders


def find(*paths: str) -> list[convert_ucf101.Clip]:
    return convert_ucf101.find_clips({PurePosixPath(path): 1 for path in paths}, Path("here"))


def test_without_split_folders_no_group_lands_in_two_splits():
    labels, groups = ("Archery", "Bowling"), range(1, 26)
    clips = find(
        *(f"UCF-101/{label}/v_{label}_g{g:02d}_c{c:02d}.avi" for label in labels for g in groups for c in range(1, 5))
    )
    splits_of, counts = defaultdict(set), defaultdict(int)
    for clip in clips:
        splits_of[clip.source.stem.split("_")[2]].add(clip.split)
        counts[clip.label, clip.split] += 1
    assert all(len(splits) == 1 for splits in splits_of.values())
    for label in labels:
        assert [counts[label, split] for split in ("train", "val", "test")] == [84, 8, 8]
    assert [clip.split for clip in clips] == ["train"] * 168 + ["val"] * 16 + ["test"] * 16


def test_clips_without_a_group_are_split_by_name_and_a_small_class_is_all_train():
    clips = find("A/1.mp4", "A/2.mp4", "A/3.mp4", "B/x.mp4", "B/y.mp4", "C/v_C_g01_c01.avi", "C/v_C_g01_c02.avi")
    assert [clip.target for clip in clips] == [
        *("train/A/3", "train/B/x", "train/B/y", "train/C/v_C_g01_c01", "train/C/v_C_g01_c02"),
        *("val/A/2", "test/A/1"),
    ]


def test_other_files_and_hidden_ones_are_left_out():
    clips = find("train/A/a.avi", "train/A/._a.avi", "train/A/notes.txt", ".cache/train/A/b.avi", "README.md")
    assert [clip.target for clip in clips] == ["train/A/a"]


def test_a_split_without_clips_has_no_jsonl(convert, clips, tmp_path):
    (tmp_path / "ucf101_val.jsonl").write_text("left by another data set")
    convert("--out_dir", tmp_path, "--video_dir", clips / "train")
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["ucf101_train.jsonl"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["notes.txt"], "expected <Class>/<clip>.avi, .mp4 or the like, found 1 other files"),
        (["a.avi"], "found 'a.avi'"),
        (["train/a.avi"], "found 'train/a.avi'"),
        (["train/A/a.avi", "B/b.avi"], "found 'train/A/a.avi' beside 'B/b.avi'; move it"),
        (["A/a.avi", "A/more/b.avi"], "found 'A/more/b.avi' beside 'A/a.avi'; move it"),
        (["A/a.avi", "A/a.mp4"], "found 'A/a.avi' and 'A/a.mp4'; rename one"),
        ([os.fsdecode(b"A\xff/a.avi")], "expected class names in UTF-8, found 'A\\udcff'; rename the folder"),
    ],
)
def test_folders_that_are_not_understood_are_refused(paths, message):
    with pytest.raises(InputError) as error:
        find(*paths)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Bad calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out_dir"),
        (["--out_dir", "OUT", "--archive", "a", "--video_dir", "b"], "not allowed with"),
        (["--out_dir", "OUT", "--num_frames", "0"], "--num_frames: expected 1 to 1000, found 0; change it"),
        (["--out_dir", "OUT", "--num_frames", "eight"], "invalid int value: 'eight'"),
        (["--out_dir", "OUT", "--quality", "101"], "--quality: expected 1 to 100, found 101; change it"),
        (["--out_dir", "OUT", "--workers", "-1"], "--workers: expected 1 to 1000, found -1; change it"),
        (["--out_dir", "OUT", "--video_dir", "/nowhere"], "--video_dir /nowhere: expected a folder, found no such"),
        (["--out_dir", "OUT/file", "--video_dir", "OUT"], "expected to read and write, found: "),
    ],
)
def test_a_bad_call_is_one_line(convert, tmp_path, arguments, message):
    (tmp_path / "A").mkdir()
    for name in ("file", "A/a.avi"):
        (tmp_path / name).write_text("")
    with pytest.raises(InputError) as error:
        convert(*(argument.replace("OUT", str(tmp_path)) for argument in arguments))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_call_ends_with_status_2():
    result = command("--out_dir", "/tmp", "--video_dir", "/nowhere")
    assert result.returncode == 2
    assert result.stderr == "error: --video_dir /nowhere: expected a folder, found no such folder; check the path\n"


# The samples beside the project


@needs_shared
def test_the_sample_archive(convert, tmp_path):
    convert("--out_dir", tmp_path, "--archive", SHARED / "ucf101" / "UCF101_subset.tar.gz")
    assert len(list(tmp_path.glob("images/*/*/*.jpg"))) == 16 * 8
    assert [len(rows(tmp_path, split)) for split in ("train", "val", "test")] == [8, 4, 4]
    assert rows(tmp_path, "val")[0]["id"] == "val-0000000008"


@needs_shared
def test_the_awkward_samples(convert, tmp_path):
    (tmp_path / "in" / "train").mkdir(parents=True)
    (tmp_path / "in" / "train" / "Awkward").symlink_to(SHARED / "awkward_video")
    said = convert("--out_dir", tmp_path, "--video_dir", tmp_path / "in")
    names = sorted(path.name for path in (SHARED / "awkward_video").iterdir())
    assert f"train {len(names)}, val 0, test 0" in said
    images = tmp_path / "images/train/Awkward"
    assert Image.open(images / "nasa_13013_rotated.0.jpg").size == (270, 480)
    assert Image.open(images / "testsrc2_321x241_yuv444p.0.jpg").size == (321, 241)
    # Each image is nearest to the frame that it was taken from.
    with av.open(str(SHARED / "awkward_video" / "numbered_frames_10.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]
    pictures = [np.asarray(Image.open(images / f"numbered_frames_10.{index}.jpg"), dtype=float) for index in range(8)]
    nearest = [int(np.argmin([abs(picture - frame).mean() for frame in frames])) for picture in pictures]
    assert nearest == [0, 1, 2, 3, 5, 6, 7, 8]


# The benchmark


def test_the_benchmark_measures_and_says_that_ffmpeg_is_missing(tmp_path):
    call = [
        sys.executable,
        "-m",
        "benchmarks.convert",
        "--clips",
        "2",
        "--rounds",
        "1",
        "--result",
        tmp_path / "a.json",
    ]
    environment = {**os.environ, "PATH": str(tmp_path)}
    result = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "ffmpeg is not installed" in result.stdout
    assert json.loads((tmp_path / "a.json").read_text())["speeds"]["convert_ucf101.py"]["images"] == 16
