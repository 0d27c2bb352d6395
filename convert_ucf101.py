"""Converts videos in class folders to frames and jsonl, the form that finetune_hf_trainer_ucf101.py trains on.

    python convert_ucf101.py --out_dir converted_ucf101                          # UCF-101 subset, fetched from the hub
    python convert_ucf101.py --out_dir converted --video_dir my_videos           # your own clips; or --archive FILE.tar.gz

Input: [train|val|test/]<Class>/<clip>. Without train, val and test folders every class is split by video group (the g01 of
v_Archery_g01_c03.avi; otherwise each clip is its own group): in the order of their names the first tenth of the groups, at
least one, is test, the next tenth val, the rest train; a class with fewer than three groups is all train.

Written into --out_dir: images/<split>/<Class>/<clip>.<i>.jpg and, last, ucf101_{train,val,test}.jsonl. Frame i of a clip is
its decoded frame floor(i * count / num_frames), as in the published recipe, where count is how many frames really decode.
Frames keep their own size and are turned as the video's rotation says. Ids count over train, val and test in this order.

A second run does only what is missing; .convert_ucf101.json holds what the images were made from. Exit status: 0, or 2 after
a bad call or when clips did not decode; the jsonl files then hold the others.
"""

import argparse
import contextlib
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import sys
import tarfile
import threading
import zlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from finetuning.data.frames import describe_failure, read_frames
from finetuning.errors import InputError, run_script

REPO, ARCHIVE = "sayakpaul/ucf101-subset", "UCF101_subset.tar.gz"
SPLITS = ("train", "val", "test")
PROMPT = "Classify the video into one of the following classes: {}."
VIDEO = re.compile(r"\.(avi|mp4|mkv|webm|mov|m4v|mpg|mpeg|wmv|flv|3gp|ogv|ts|gif)$", re.IGNORECASE)
GROUP = re.compile(r"_(g\d+)_c\d+$")
# Of what an archive holds over its own size: videos are compressed already (UCF-101: 1.0); a bomb's zeros shrink 1000 times.
MOST_GROWTH = 100


@dataclass(frozen=True)
class Clip:
    """A video: its path below --video_dir or in the archive, its size in bytes, its split and its class."""

    source: PurePosixPath
    size: int
    split: str
    label: str

    @property
    def target(self) -> str:
        """Path of its images, without `.<i>.jpg`."""
        return f"{self.split}/{self.label}/{self.source.stem}"


def list_folder(folder: Path) -> dict[PurePosixPath, int]:
    """Size in bytes of every file below a folder."""
    if not folder.is_dir():
        raise InputError(f"--video_dir {folder}: expected a folder, found no such folder; check the path")
    files = [Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names]
    return {PurePosixPath(file.relative_to(folder)): file.stat().st_size for file in files if file.is_file()}


def list_archive(archive: Path) -> dict[PurePosixPath, int]:
    """Size in bytes of every file of an archive.

    Raises:
        InputError: if it cannot be read to its end, holds anything but folders and files that stay inside, each once, or
            grows far beyond its own size.
    """
    files, total = {}, 0
    try:
        status = archive.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{archive}: expected a whole .tar.gz, found: no regular file; fetch or pack it again")
        with tarfile.open(archive) as tar:
            for member in tar:
                path, fault = PurePosixPath(member.name), ""
                total += member.size
                if not (member.isreg() or member.isdir()) or member.issparse():
                    fault = "a link, a device or another special file"
                elif path.is_absolute() or ".." in path.parts:
                    fault = "a path that leads out of it"
                elif path in files:
                    fault = "the same path twice"
                elif total > MOST_GROWTH * status.st_size:
                    fault = f"files of over {MOST_GROWTH} times its size"
                if fault:
                    raise InputError(
                        f"{archive}: {member.name!r}: expected folders and files inside the archive, found {fault}; "
                        "nothing was written; pack it again without that"
                    )
                if member.isreg():
                    files[path] = member.size
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        line = getattr(error, "strerror", None) or str(error).splitlines()[0].rstrip(":")
        raise InputError(f"{archive}: expected a whole .tar.gz, found: {line}; fetch or pack it again") from None
    return files


def split_by_group(paths: list[PurePosixPath]) -> dict[PurePosixPath, str]:
    """Split of each clip of one class (the rule stands at the top of this file)."""
    groups = defaultdict(list)
    for path in paths:
        match = GROUP.search(path.stem)
        groups[match[1] if match else path.stem].append(path)
    tenth = max(1, len(groups) // 10) if len(groups) >= 3 else 0
    splits = ["test"] * tenth + ["val"] * tenth + ["train"] * (len(groups) - 2 * tenth)
    return {path: split for group, split in zip(sorted(groups), splits, strict=True) for path in groups[group]}


def layout(path: PurePosixPath) -> tuple[tuple[str, ...], bool]:
    """The folders above [split/]<Class>/<clip>, and whether there is a split."""
    split = path.parent.parent.name in SPLITS
    return path.parts[: -3 if split else -2], split


def find_clips(files: dict[PurePosixPath, int], where: Path) -> list[Clip]:
    """All clips in the order of their ids: train, val, test, then class, then name.

    Raises:
        InputError: if there is none, or the folders are not [split/]<Class>/<clip>, or two clips would share images.
    """
    hidden = {path for path in files if any(part.startswith(".") for part in path.parts)}
    videos = sorted(path for path in files.keys() - hidden if VIDEO.search(path.name))
    if not videos:
        raise InputError(f"{where}: expected <Class>/<clip>.avi, .mp4 or the like, found {len(files)} other files")
    classes = defaultdict(list)
    for path in videos:
        label = path.parent.name
        if not label or label in SPLITS or layout(path) != layout(videos[0]):
            raise InputError(
                f"{where}: expected <Class>/<clip> or {'|'.join(SPLITS)}/<Class>/<clip> throughout, "
                f"found {str(path)!r} beside {str(videos[0])!r}; move it"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in label):  # How Python shows bytes that are not UTF-8.
            raise InputError(f"{where}: expected class names in UTF-8, found {label!r}; rename the folder")
        classes[label].append(path)
    has_splits = layout(videos[0])[1]
    clips = {}
    for label, paths in classes.items():
        splits = {path: path.parent.parent.name for path in paths} if has_splits else split_by_group(paths)
        for path in paths:
            clip = Clip(path, files[path], splits[path], label)
            other = clips.setdefault(clip.target, clip)
            if other != clip:
                pair = f"{str(other.source)!r} and {str(path)!r}"
                raise InputError(f"{where}: expected names that differ before the suffix, found {pair}; rename one")
    return sorted(clips.values(), key=lambda clip: (SPLITS.index(clip.split), clip.label, clip.source.name))


def write_whole(path: Path, data: bytes, partial: Path) -> None:
    """Writes a file so that it appears whole or not at all."""
    temporary = partial / str(os.getpid())
    temporary.write_bytes(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, path)


def convert_clip(path: Path, target: Path, num_frames: int, quality: int, partial: Path) -> tuple[str, str]:
    """Writes the images of one clip.

    Returns:
        What is to be said about a clip that was converted, and why it was not; both may be empty.
    """
    try:
        jpegs, note = read_frames(str(path), num_frames, quality)
    except Exception as error:  # Decoders fail in many ways; all of them concern this clip only.
        return "", describe_failure(error)
    finally:
        if path.parent == partial:
            path.unlink()
    for number, jpeg in enumerate(jpegs):
        write_whole(Path(f"{target}.{number}.jpg"), jpeg, partial)
    return note, ""


def start_worker() -> None:
    """Leaves Ctrl-C to the main process, and ends this one with it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def unpack(archive: Path, clips: list[Clip], partial: Path) -> Iterator[tuple[Clip, Path]]:
    """Copies clips out of an archive one by one, each to a numbered file: no name of the archive becomes a path here."""
    missing = {clip.source: clip for clip in clips}
    with tarfile.open(archive) as tar:
        for member in tar:
            clip = missing.pop(PurePosixPath(member.name), None) if member.isreg() else None
            if clip:
                path = partial / f"{len(missing)}{clip.source.suffix}"
                with tar.extractfile(member) as source, open(path, "wb") as copy:
                    shutil.copyfileobj(source, copy)
                yield clip, path


def convert_all(jobs: Iterator[tuple[Clip, Path]], args, partial: Path) -> Iterator[tuple[Clip, str, str]]:
    """Converts clips on all workers; yields each, once it is done, with what `convert_clip` returned."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, context, start_worker) as pool:
        running = {}
        for clip, path in jobs:
            target = args.out_dir / "images" / clip.target
            future = pool.submit(convert_clip, path, target, args.num_frames, args.quality, partial)
            running[future] = clip
            if len(running) >= 4 * args.workers:  # So that few copies from an archive lie about.
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), *done.result()
        for done in as_completed(list(running)):
            yield running.pop(done), *done.result()


def find_missing(clips: list[Clip], args: argparse.Namespace, partial: Path) -> list[Clip]:
    """Clips that lack an image, after removing images that were made from another file or with other settings."""
    images, record = args.out_dir / "images", args.out_dir / ".convert_ucf101.json"
    made_from = {clip.target: [clip.size, args.num_frames, args.quality] for clip in clips}
    before = json.loads(record.read_text()) if record.exists() else {}
    existing = set()
    for root, _, names in os.walk(images):
        for image in (Path(root, name) for name in names):
            target = image.relative_to(images).as_posix().rsplit(".", 2)[0]
            if target in made_from and made_from[target] != before.get(target):
                image.unlink()
            else:
                existing.add(image.relative_to(images).as_posix())
    write_whole(record, json.dumps(made_from, indent=0).encode(), partial)
    return [clip for clip in clips if any(f"{clip.target}.{i}.jpg" not in existing for i in range(args.num_frames))]


def write_jsonl(clips: list[Clip], bad: dict[Clip, str], args: argparse.Namespace, partial: Path) -> None:
    """Writes a jsonl file for each split that has clips.

    A bad clip keeps its number, so that no other id changes once it is repaired.
    """
    prompt = PROMPT.format(", ".join(sorted({clip.label for clip in clips})))
    lines = {split: [] for split in SPLITS}
    for number, clip in enumerate(clips):
        if clip not in bad:
            images = [f"{clip.target}.{i}.jpg" for i in range(args.num_frames)]
            turn = {"images": images, "user": prompt, "assistant": clip.label}
            row = {"id": f"{clip.split}-{number:010d}", "source": "ucf101", "conversations": [turn]}
            lines[clip.split].append(json.dumps(row) + "\n")
    for split in SPLITS:
        path = args.out_dir / f"ucf101_{split}.jsonl"
        if lines[split]:
            write_whole(path, "".join(lines[split]).encode(), partial)
        else:
            path.unlink(missing_ok=True)


class Parser(argparse.ArgumentParser):
    """ArgumentParser with one line instead of a page of usage for a wrong flag."""

    def error(self, message):
        raise InputError(f"{message} (--help lists all flags)")


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, required=True, help="folder to write")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--archive", type=Path, help=f"tar archive of class folders (default: {ARCHIVE} of {REPO})")
    source.add_argument("--video_dir", type=Path, help="folder of class folders")
    parser.add_argument("--num_frames", type=int, default=8, help="frames a clip (8)")
    parser.add_argument("--quality", type=int, default=92, help="JPEG quality, 1 to 100 (92)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (all cores)")
    parser.add_argument("--skip_bad", action="store_true", help="exit status 0 although clips did not decode")
    args = parser.parse_args()
    for name, most in {"num_frames": 1000, "quality": 100, "workers": 1000}.items():
        if not 1 <= getattr(args, name) <= most:
            raise InputError(f"--{name}: expected 1 to {most}, found {getattr(args, name)}; change it")
    return args


def fetch() -> Path:
    """Path of the UCF-101 subset, fetched from the hub unless it is in its cache."""
    # Not above: with --archive or --video_dir the hub's client is not needed.
    from finetuning.data.hub import fetch_file

    return fetch_file(REPO, ARCHIVE, "or give --archive")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps a second run out of it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: expected one run at a time, found another at work; wait for it") from None
    except OSError:  # Not every network file system locks folders.
        pass
    try:
        yield
    finally:
        os.close(handle)


def convert(clips: list[Clip], archive: Path | None, args: argparse.Namespace) -> None:
    """Converts the clips that are missing, then writes the jsonl files."""
    partial = args.out_dir / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # What a run that was killed left behind.
    partial.mkdir()
    missing = find_missing(clips, args, partial)
    jobs = unpack(archive, missing, partial) if archive else ((clip, args.video_dir / clip.source) for clip in missing)
    bad = {}
    with tqdm(total=len(clips), initial=len(clips) - len(missing), unit="clip") as bar:
        for clip, note, fault in convert_all(jobs, args, partial):
            if fault:
                bad[clip] = fault
            if note:
                bar.write(f"{clip.source}: {note}")
            bar.update()
    write_jsonl(clips, bad, args, partial)
    shutil.rmtree(partial)
    counts = ", ".join(f"{split} {sum(clip.split == split and clip not in bad for clip in clips)}" for split in SPLITS)
    print(
        f"{args.out_dir}: clips: {counts}, {len(missing) - len(bad)} of them new; not decoded: {len(bad)}", flush=True
    )
    for clip in sorted(bad, key=clips.index):
        print(f"not decoded: {clip.source}: {bad[clip]}", flush=True)
    if bad and not args.skip_bad:
        raise InputError(
            f"expected every clip to decode, found {len(bad)} that did not (listed above) and are left out; "
            "repair them and run again, or pass --skip_bad"
        )


def main() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # A path may hold bytes that are not UTF-8.
    try:
        args = parse_args()
        archive = None if args.video_dir else args.archive or fetch()
        files = list_archive(archive) if archive else list_folder(args.video_dir)
        clips = find_clips(files, archive or args.video_dir)
        with locked(args.out_dir):
            convert(clips, archive, args)
    except BrokenProcessPool:
        raise InputError(
            "expected every worker to finish, found one killed (no memory left, or a clip crashed the decoder); "
            "run again to go on, with fewer --workers"
        ) from None
    except OSError as error:
        raise InputError(f"expected to read and write, found: {error}; mend it and run again to go on") from None
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again to go on")


if __name__ == "__main__":
    run_script(main)
