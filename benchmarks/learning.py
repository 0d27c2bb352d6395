"""Learning proof of three recipes: from chance to at least 0.9 on held-out rows, with the real scripts and a tiny model.

    python -m benchmarks.learning
    python -m benchmarks.learning --task nlvr2 --out_dir learning_output

Each task's data are made here, the same for the same seed, balanced over all answers, and need all that a sample holds:

- nlvr2: two pictures of a shape each: whether their colours are the same, and in half of the rows, as a second turn, which
  they are. One picture alone is as often in a "Yes" as in a "No".
- hateful_memes: a coloured disc and a caption that names a colour, in the challenge's layout; hateful where they differ.
- ucf101: clips of a square that goes left, right, up or down, from anywhere and round the edges, so that one frame alone
  says nothing; written as videos and converted by convert_ucf101.py.

That holds for all held-out rows. Training starts from random weights, and where only the conjunction of two parts tells
anything, it may stay at chance for long; so a part of the training rows is easier: every fourth row of hateful_memes asks for
the colour of the disc, and every second clip of ucf101 enters at an edge. nlvr2's second turn does the same.

The scripts run under torchrun with two processes, one thread each, full fine-tuning. No picture, and so no pair or clip, is
in two splits. "One part" is the accuracy on held-out rows of the best rule that training rows give to one who sees a part
alone (a picture, the caption, a frame): what the data give away. Untrained, the model answers no question in words, so its
accuracy is 0 rather than chance.

Units: accuracy and AUROC, 0 to 1; seconds that passed. Written: benchmarks/results/learning.json.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from importlib import import_module
from itertools import cycle, islice, product
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken

import convert_ucf101
import finetune_hf_trainer_hateful_memes
from demo import build_config, build_processor, build_tokenizer
from finetuning.data.encoding import count_tokens
from finetuning.data.reading import read_splits
from finetuning.errors import InputError, run_script
from phi3v import Phi3VForCausalLM, Phi3VProcessor

from .record import RESULTS, ROOT, provenance, write

SIDE = 56  # pixels of a picture, which is one crop of 2 x 2 image tokens
COLOURS = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (40, 60, 230)}
SHAPES = ("square", "disc", "cross")
# Two colours each: half of the pairs are alike, and in both halves each colour stands on each side equally often.
PAIRS = tuple((first, second) for first in COLOURS for second in (first, *COLOURS))
MOVES = {"Left": (-1, 0), "Right": (1, 0), "Up": (0, -1), "Down": (0, 1)}


def build_model(folder: Path, seed: int, prompt: str) -> None:
    """The demo's tiny model with random weights, for pictures of SIDE x SIDE pixels and the words of `prompt`."""
    tokenizer = build_tokenizer()
    # A token a word, which the demo's tokenizer would spell, to learn in a third of the time.
    words = sorted(set(re.findall(r"\w\w+", prompt)))
    tokenizer.add_tokens([AddedToken(word, lstrip=True, normalized=False) for word in words])
    config = build_config(tokenizer)
    config.vision_config.image_size = SIDE
    torch.manual_seed(seed)
    Phi3VForCausalLM(config).save_pretrained(folder)
    build_processor(tokenizer, config).save_pretrained(folder)


def balanced(count: int, rng: random.Random, *choices: Iterable) -> list[tuple]:
    """`count` combinations of the choices in random order, each as often as any other."""
    combinations = list(islice(cycle(product(*choices)), count))
    rng.shuffle(combinations)
    return combinations


class Painter:
    """Draws shapes in places and shades that no other picture has."""

    def __init__(self, rng: random.Random):
        self.rng, self.seen = rng, set()

    def draw(self, colour: str, shape: str = "disc") -> Image.Image:
        while True:
            size = self.rng.randint(18, 26)
            x, y = self.rng.randint(1, SIDE - size - 2), self.rng.randint(1, SIDE - size - 2)
            ink = tuple(max(0, min(255, part + self.rng.randint(-20, 20))) for part in COLOURS[colour])
            if (size, x, y, ink) not in self.seen:
                break
        self.seen.add((size, x, y, ink))
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        draw, third = ImageDraw.Draw(picture), size // 3
        if shape == "disc":
            draw.ellipse((x, y, x + size, y + size), ink)
        elif shape == "square":
            draw.rectangle((x, y, x + size, y + size), ink)
        else:
            draw.rectangle((x + third, y, x + size - third, y + size), ink)
            draw.rectangle((x, y + third, x + size, y + size - third), ink)
        return picture


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build_nlvr2(folder: Path, counts: dict[str, int], rng: random.Random) -> float:
    """Writes train.jsonl, test.jsonl and images/; returns the accuracy of the best rule from one picture."""
    (folder / "images").mkdir(parents=True)
    painter, known = Painter(rng), {}
    for split, count in counts.items():
        rows, known[split] = [], []
        for index, (colours, turns) in enumerate(balanced(count, rng, PAIRS, (1, 2))):
            names = [f"images/{split}-{index:05}-{number}.png" for number in (1, 2)]
            for name, ink in zip(names, colours, strict=True):
                painter.draw(ink, rng.choice(SHAPES)).save(folder / name, compress_level=1)
            texts = [
                {"user": "Same colour?", "assistant": "Yes" if colours[0] == colours[1] else "No"},
                {"user": "Which colours?", "assistant": " ".join(colours)},
            ][:turns]
            known[split].append((colours[0], texts[0]["assistant"]))
            rows.append({"id": f"{split}-{index}", "images": names, "texts": texts})
        write_jsonl(folder / f"{split}.jsonl", rows)
    return single_part(known["train"], known["test"])


def build_hateful_memes(folder: Path, counts: dict[str, int], rng: random.Random) -> float:
    """Writes train.jsonl, dev.jsonl and img/; returns the accuracy of the best rule from the caption."""
    (folder / "img").mkdir(parents=True)
    painter, known = Painter(rng), {}
    for split, count in counts.items():
        rows, known[split] = [], []
        # The rows that ask for the colour alone: without them, training dwells at chance for a time that hangs on the seed.
        kinds = ("meme", "meme", "meme", "colour") if split == "train" else ("meme",)
        for index, ((colour, text), kind) in enumerate(balanced(count, rng, PAIRS, kinds)):
            name = f"img/{split}-{index:05}.png"
            painter.draw(colour).save(folder / name, compress_level=1)
            label = int(text != colour)
            if kind == "meme":
                rows.append({"id": f"{split}-{index}", "img": name, "label": label, "text": text})
                known[split].append((text, label))
            else:
                texts = [{"user": "Which colour?", "assistant": colour}]
                rows.append({"id": f"{split}-{index}", "images": [name], "texts": texts})
        write_jsonl(folder / f"{split}.jsonl", rows)
    return single_part(known["train"], known["dev"])


def build_ucf101(folder: Path, counts: dict[str, int], rng: random.Random) -> float:
    """Writes videos, converts them into the folder; returns the accuracy of the best rule from the first frame."""
    # A shade a clip, so that no two clips share a frame.
    known, inks = {}, list(product(range(0, 120, 7), repeat=3))
    rng.shuffle(inks)
    with tempfile.TemporaryDirectory() as videos:
        for split, count in counts.items():
            known[split] = []
            # Without the clips that enter at an edge, training dwells hundreds of steps at chance before it finds motion.
            entering = (True, False) if split == "train" else (False,)
            for index, (name, enters, *start) in enumerate(balanced(count, rng, MOVES, entering, range(4), range(4))):
                if enters:
                    start = [{1: 0, -1: 3}.get(step, place) for place, step in zip(start, MOVES[name], strict=True)]
                ink = inks.pop()
                path = Path(videos) / split / name / f"v_{name}_g01_c{index:05}.avi"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_clip(path, [place * SIDE // 4 for place in start], MOVES[name], ink)
                known[split].append((tuple(start), name))
        convert = [sys.executable, "convert_ucf101.py", "--video_dir", videos, "--out_dir", str(folder)]
        _call(convert, folder.with_suffix(".convert.log"))
    return single_part(known["train"], known["val"])


def write_clip(path: Path, start: list[int], move: tuple[int, int], ink: tuple[int, int, int]) -> None:
    """16 frames of a square that moves an eighth of the picture in each, and comes in again where it went out."""
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=8, width=SIDE, height=SIDE, pix_fmt="yuv420p", bit_rate=2_000_000)
        stream.codec_context.thread_count = 1
        for number in range(16):
            frame = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
            frame[: SIDE // 4, : SIDE // 4] = ink
            x, y = (place + number * SIDE // 8 * step for place, step in zip(start, move, strict=True))
            frame = np.roll(frame, (y, x), axis=(0, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _call(command: list[str], log: Path) -> None:
    """Runs a command of the repository, its output in a file.

    Raises:
        RuntimeError: if it fails, with the last lines of that file.
    """
    with open(log, "w", encoding="utf-8") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise RuntimeError(
            "\n".join((f"{' '.join(command)}: expected exit status 0, found {code}; end of {log}:", *lines))
        )


def single_part(train: list[tuple[Hashable, Hashable]], held_out: list[tuple[Hashable, Hashable]]) -> float:
    """Accuracy on held-out rows of answering what was the most frequent answer to the same part in training."""
    answers = defaultdict(Counter)
    for part, answer in train:
        answers[part][answer] += 1
    return sum(answers[part].most_common(1)[0][0] == answer for part, answer in held_out) / len(held_out)


@dataclass(frozen=True)
class Task:
    """What is made and run for one recipe.

    Args:
        build (Callable): (folder, rows of each split, random numbers) -> accuracy of the best rule from one part.
        held_out (str): name of the split that is answered.
        train_rows, epochs (int): size of the run.
        part (str): what the rule behind single_part knows.
        prompt (str): text whose words the tokenizer gets.
    """

    build: Callable[[Path, dict[str, int], random.Random], float]
    held_out: str
    train_rows: int
    epochs: int
    part: str
    prompt: str


TASKS = {
    "nlvr2": Task(build_nlvr2, "test", 2400, 2, "first picture", "Same Which colour colours"),
    "hateful_memes": Task(
        build_hateful_memes, "dev", 2400, 2, "caption", " ".join((finetune_hf_trainer_hateful_memes.PROMPT, *COLOURS))
    ),
    "ucf101": Task(build_ucf101, "val", 1536, 5, "first frame", " ".join((convert_ucf101.PROMPT, *MOVES))),
}
HELD_OUT_ROWS = 384  # with the rows to train on a multiple of what each task balances
FLAGS = (
    *("--batch_size", "16", "--batch_size_per_gpu", "8", "--num_crops", "1", "--learning_rate", "2e-3"),
    *("--recompute", "none", "--save_strategy", "no", "--logging_steps", "25", "--no-tqdm"),
    *("--per_device_eval_batch_size", "36", "--max_new_tokens", "16"),
)


def learn(name: str, out_dir: Path, seed: int) -> dict:
    """Makes the task's data and model, runs its script, and returns what the result file holds of it."""
    task, folder = TASKS[name], out_dir / name
    if folder.exists():
        raise InputError(f"{folder}: expected no such folder yet; remove it or choose another --out_dir")
    folder.mkdir(parents=True)
    start = time.monotonic()
    counts = {"train": task.train_rows, task.held_out: HELD_OUT_ROWS}
    guessed = task.build(folder / "data", counts, random.Random(seed))
    build_model(folder / "model", seed, task.prompt)
    made = time.monotonic()
    script = f"finetune_hf_trainer_{name}.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = ["--model_name_or_path", str(folder / "model"), "--data_dir", str(folder / "data")]
    epochs = ["--num_train_epochs", str(task.epochs), "--output_dir", str(folder / "run"), "--seed", str(seed)]
    _call([sys.executable, *launcher, script, *paths, *epochs, *FLAGS], folder / "run.log")
    log = (folder / "run.log").read_text(encoding="utf-8", errors="replace")
    figures = {}
    for stage in ("before", "after"):
        evaluation = json.loads((folder / "run" / f"eval_{stage}.json").read_text(encoding="utf-8"))
        measured = {key: value for key, value in evaluation.items() if isinstance(value, float) and key != "seconds"}
        figures[stage] = {key: round(value, 4) for key, value in measured.items()}
    return {
        **provenance("torch", "transformers", "accelerate", "deepspeed", "av", "pillow"),
        "script": script,
        "seed": seed,
        "train_rows": task.train_rows,
        "held_out_rows": HELD_OUT_ROWS,
        "answers": evaluation["num_answers"],
        "tokens_per_row": mean_tokens(folder, task.held_out),
        "epochs": task.epochs,
        "single_part": {"part": task.part, "accuracy": round(guessed, 4)},
        **figures,
        "seconds": {
            "data": round(made - start, 1),
            "training": round(float(re.findall(r"train_runtime\W+([\d.]+)", log)[-1]), 1),
            "script": round(time.monotonic() - made, 1),
        },
    }


def mean_tokens(folder: Path, held_out: str) -> float:
    """Mean length of the held-out rows as they would be trained."""
    to_conversation = import_module(f"finetune_hf_trainer_{folder.name}").to_conversation
    processor = Phi3VProcessor.from_pretrained(folder / "model", trust_remote_code=False)
    _, rows = read_splits(folder / "data", evaluation=held_out)
    return round(statistics.mean(count_tokens(to_conversation(row), processor) for row in rows), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=(*TASKS, "all"), default="all", help="recipe to run (all)")
    parser.add_argument("--out_dir", type=Path, help="folder to keep data, models and runs in (default: not kept)")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the weights and the order of rows (0)")
    parser.add_argument("--result", type=Path, default=RESULTS / "learning.json", help="file to write")
    args = parser.parse_args()
    names = list(TASKS) if args.task == "all" else [args.task]
    # Tasks that are not run now keep what they had.
    result = json.loads(args.result.read_text(encoding="utf-8")) if args.result.exists() else {"tasks": {}}
    print(
        f"{'':14} {'before':>8} {'after':>8} {'one part':>9} {'rows':>6} {'tokens':>7} {'training, s':>12} {'all, s':>8}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            found = learn(name, (args.out_dir or Path(temporary)).resolve(), args.seed)
            result["tasks"][name] = found
            for metric, before in found["before"].items():
                if "/" not in metric:
                    seconds = found["seconds"]
                    print(
                        f"{name:14} {before:8.3f} {found['after'][metric]:8.3f} {found['single_part']['accuracy']:9.3f} "
                        f"{found['train_rows']:6} {found['tokens_per_row']:7.1f} {seconds['training']:12.1f} "
                        f"{seconds['data'] + seconds['script']:8.1f}  {metric}",
                        flush=True,
                    )
    write(args.result, result)
    print(f"{found['machine']} -> {args.result}")


if __name__ == "__main__":
    run_script(main)
