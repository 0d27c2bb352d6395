"""Speed of convert_ucf101.py against the ffmpeg command line, on the same clips in the same run.

    python -m benchmarks.convert
    python -m benchmarks.convert --video_dir UCF101_subset

Both write 8 evenly spaced JPEGs a clip with one worker and one thread. ffmpeg goes the straightforward way, clip after
clip: ffprobe -count_frames, then ffmpeg with a select filter. convert_ucf101.py is timed as a whole command, Python's start
included. Without --video_dir the clips are made here, like UCF-101: 320 x 240, MPEG-4 AVI, 25 frames a second, 5 to 7 s.

Unit: clips for each second of CPU time of all processes (what one core does, however busy the machine), and clips for each
second that passed; medians over the rounds. Written: benchmarks/results/convert.json.
"""

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from PIL import Image

from convert_ucf101 import VIDEO
from finetuning.data.frames import frame_indices
from finetuning.errors import InputError, run_script

from .record import RESULTS, ROOT, provenance, write

NUM_FRAMES = 8


def make_clip(path: Path, seed: int) -> None:
    """Writes a clip of a texture that drifts, with the noise of a camera."""
    rng = np.random.default_rng(seed)
    texture = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    texture = np.asarray(texture, dtype=np.int16)
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=25, width=320, height=240, pix_fmt="yuv420p", bit_rate=600_000)
        for index in range(int(rng.integers(125, 176))):
            view = texture[index % 240 :, index % 320 :][:240, :320] + rng.integers(-6, 7, (240, 320, 1))
            frame = av.VideoFrame.from_ndarray(view.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def call(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def run_ours(video_dir: Path, out_dir: Path) -> None:
    call(sys.executable, "convert_ucf101.py", "--workers", "1", "--video_dir", video_dir, "--out_dir", out_dir)


def run_ffmpeg(video_dir: Path, out_dir: Path) -> None:
    for clip in find_videos(video_dir):
        count = ["-count_frames", "-show_entries", "stream=nb_read_frames", "-of", "csv=p=0"]
        frames = int(
            call("ffprobe", "-v", "error", "-threads", "1", "-select_streams", "v:0", *count, clip).strip(" ,\n")
        )
        select = "+".join(rf"eq(n\,{index})" for index in sorted(set(frame_indices(frames, NUM_FRAMES))))
        target = out_dir / clip.relative_to(video_dir).with_suffix("")
        target.parent.mkdir(parents=True, exist_ok=True)
        one_thread = ["-threads", "1", "-filter_threads", "1"]
        images = ["-vf", f"select={select}", "-vsync", "0", "-q:v", "2", "-threads", "1", f"{target}.%d.jpg"]
        call("ffmpeg", "-v", "error", "-nostdin", *one_thread, "-i", clip, *images)


def find_videos(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if VIDEO.search(path.name))


def measure(job: Callable[[Path, Path], None], video_dir: Path) -> tuple[float, float, int]:
    """Seconds of CPU time, seconds that passed, and images written."""
    with tempfile.TemporaryDirectory() as folder:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        job(video_dir, Path(folder))
        passed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        images = len(list(Path(folder).rglob("*.jpg")))
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, passed, images


def benchmark(video_dir: Path, rounds: int) -> dict:
    """Runs both, in turns so that a busy machine slows both; returns what the result file holds."""
    jobs = {"convert_ucf101.py": run_ours, "ffmpeg": run_ffmpeg}
    if not (shutil.which("ffmpeg") and shutil.which("ffprobe")):
        print("ffmpeg is not installed (apt-get install ffmpeg): only convert_ucf101.py is measured")
        del jobs["ffmpeg"]
    clips = find_videos(video_dir)
    seconds = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            seconds[name].append(measure(job, video_dir))
    speeds = {}
    for name, measured in seconds.items():
        cpu, passed = (statistics.median(column) for column in list(zip(*measured, strict=True))[:2])
        speeds[name] = {
            "clips_per_cpu_second": round(len(clips) / cpu, 2),
            "clips_per_second": round(len(clips) / passed, 2),
            "images": measured[0][2],
        }
    result = {
        **provenance("av", "pillow"),
        "clips": len(clips),
        "rounds": rounds,
        "speeds": speeds,
    }
    if "ffmpeg" in speeds:
        result["versions"]["ffmpeg"] = call("ffmpeg", "-version").split()[2]
        for unit in ("clips_per_cpu_second", "clips_per_second"):
            result[f"ratio_{unit}"] = round(speeds["convert_ucf101.py"][unit] / speeds["ffmpeg"][unit], 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video_dir", type=Path, help="clips to measure on, laid out as for convert_ucf101.py")
    parser.add_argument("--clips", type=int, default=36, help="clips to make without --video_dir (36)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (3)")
    parser.add_argument("--result", type=Path, default=RESULTS / "convert.json", help="file to write")
    args = parser.parse_args()
    if args.video_dir and not find_videos(args.video_dir):
        raise InputError(f"--video_dir {args.video_dir}: expected videos in class folders, found none; check the path")
    with tempfile.TemporaryDirectory() as folder:
        video_dir = args.video_dir.resolve() if args.video_dir else Path(folder)
        for number in range(0 if args.video_dir else args.clips):
            path = video_dir / f"Class{number % 4}/v_Class{number % 4}_g{number // 4:02d}_c01.avi"
            path.parent.mkdir(exist_ok=True)
            make_clip(path, number)
        result = benchmark(video_dir, args.rounds)
        result["data"] = "UCF-101 like clips made by this benchmark" if not args.video_dir else args.video_dir.name
    print(f"{'':20} {'clips / CPU second':>20} {'clips / second':>16} {'images':>8}")
    for name, speed in result["speeds"].items():
        cpu, passed, images = speed.values()
        print(f"{name:20} {cpu:20.2f} {passed:16.2f} {images:8}")
    if "ffmpeg" in result["speeds"]:
        print(f"{'ratio':20} {result['ratio_clips_per_cpu_second']:20.2f} {result['ratio_clips_per_second']:16.2f}")
    write(args.result, result)
    print(f"{result['clips']} clips, {result['machine']} -> {args.result}")


if __name__ == "__main__":
    run_script(main)
