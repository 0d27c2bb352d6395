"""Writes the README's tables of what was measured from the result files; a test holds the two together.

python -m benchmarks.readme
"""

import json
from collections import Counter
from typing import Any

from .record import RESULTS, ROOT

END = "<!-- end -->\n"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def rows() -> list[tuple[str, str, str]]:
    """What was measured, the result, and the command that wrote the file of that name."""
    deviations = load("parity")["deviations"]
    logits = max(deviation["largest"] for name, deviation in deviations.items() if "logit" in name or "last16" in name)
    parity = (
        f"logits {logits:.1e}, loss {deviations['loss, eager']['largest']:.1e}, gradient norms "
        f"{deviations['gradients: norm, relative']['largest']:.1e} relative; ids, HD images and crops equal"
    )
    demo = load("demo")["strategies"]
    full = demo["full"]
    after = ", ".join(f"{name} {demo[name]['anls_after']:.2f}" for name in ("frozen", "lora", "qlora"))
    learned = load("learning")["tasks"]
    names = {"nlvr2": "NLVR2", "hateful_memes": "Hateful Memes", "ucf101": "UCF-101"}
    accuracy = ", ".join(f"{names[name]} {task['after']['accuracy']:.3f}" for name, task in learned.items())
    speeds = load("convert")["speeds"]
    clips = [speeds[name]["clips_per_cpu_second"] for name in ("convert_ucf101.py", "ffmpeg")]
    interrupt, cost = load("interrupt"), load("checkpoint_cost")
    found = {name: interrupt[name] for name in ("full", "lora")}
    ends = [end for part in found.values() for end in (*part["ends"], *part["stops"])]
    equal = sum(all(value for key, value in end.items() if key.endswith("_equal")) for end in ends)
    kills = [kill for part in found.values() for kill in part["kills"]]
    phases = ", ".join(f"{count} {phase}" for phase, count in Counter(kill["phase"] for kill in kills).most_common())
    stops = [stop["seconds_until_exit"] for part in found.values() for stop in part["stops"]]
    rank = max(part["rank_killed"]["seconds_until_all_ended"] for part in found.values())
    checkpoint = cost["seconds_a_checkpoint"]
    return [
        (
            "parity with the official code, largest deviation in float32",
            parity,
            "pytest tests/parity --parity-results benchmarks/results/parity.json",
        ),
        (
            "the demo: ANLS on held-out pages before and after, seconds of training",
            f"full {full['anls_before']:.2f} to {full['anls_after']:.2f} in {full['train_seconds']:.0f} s; from there {after}",
            "python -m benchmarks.demo",
        ),
        (
            "a tiny model learns what no single picture, caption or frame tells: accuracy on held-out rows, one seed",
            accuracy,
            "python -m benchmarks.learning",
        ),
        (
            f"{len(kills)} kills (-9) of two-process runs, full and LoRA ({phases}), and {len(stops)} SIGTERMs: runs that ended "
            "with the weights, losses and answers of an undisturbed one",
            f"{equal} of {len(ends)}; {max(stops)} s at most from SIGTERM to exit, {rank} s from the death of a rank",
            "python -m benchmarks.interrupt",
        ),
        (
            "a step, and a checkpoint of the tiny model, against transformers' own Trainer",
            f"{cost['step_ratio']:.2f} times the time; {checkpoint['RecipeTrainer']:.2f} s against {checkpoint['Trainer']:.2f} s",
            "python -m benchmarks.checkpoint_cost",
        ),
        (
            "clips converted per CPU second, against ffprobe and ffmpeg on the command line",
            f"{clips[0]:.2f} against {clips[1]:.2f}",
            "python -m benchmarks.convert",
        ),
    ]


def speed() -> list[tuple[str, str, str]]:
    """As `rows`, of speed and memory."""
    cases, command = load("train_step_ratios")["cases"], "python -m benchmarks.train_step --ratios"
    names = {
        "full photo": "full fine-tuning, a 640 x 480 photo",
        "frozen photo": "frozen vision, the same photo",
        "full meme": "full fine-tuning, a 200 x 200 meme",
    }
    found = [
        (
            f"training step against the official way: {what}",
            f"{cases[name]['seconds']['ratio']:.2f} of its time, {cases[name]['memory_step']['ratio']:.2f} of its memory",
            command,
        )
        for name, what in names.items()
    ]
    images = load("preprocess")["cases"]
    for name, what in (("page", "1700 x 2200 page, 16 crops"), ("photo", "640 x 480 photo, 4 crops")):
        case = images[name]
        found.append(
            (
                f"images prepared a second on one core: {what}; the official steps in the same run",
                f"{case['img_per_s']:.1f}; {1 / case['reference_seconds']:.1f}",
                "python -m benchmarks.preprocess",
            )
        )
    mixed = load("epoch")
    tokens, padded = mixed["tokens"], mixed["tokens_padded"]
    found.append(
        (
            f"an epoch of samples of 10 to 2,500 tokens ({tokens:,} in all, {padded:,} when padded), micro-batches of 8",
            f"padding-free in {mixed['ratio']:.2f} of the time of padded",
            "python -m benchmarks.epoch",
        )
    )
    answers = load("evaluate")
    for name, case in answers["cases"].items():
        found.append(
            (
                f"answers of {answers['given']['new_tokens']} tokens a second, {answers['given']['batch']} at once: {name}s",
                f"{case['ratio']:.2f} times those one by one",
                "python -m benchmarks.evaluate",
            )
        )
    scaling = load("scaling")["measured"]
    efficiency = ", ".join(f"{name} {case['efficiency']:.2f}" for name, case in scaling.items())
    found.append(("efficiency of two processes with one core each", efficiency, "python -m benchmarks.scaling"))
    return found


def levers() -> str:
    lines = ["| lever | time | memory | |", "|---|---|---|---|"]
    for entry in load("levers")["levers"][1:]:
        lines.append(f"| {entry['lever']} | {entry['time']:.2f} | {entry['memory']:.2f} | {entry['verdict']} |")
    return "\n".join((*lines, ""))


def readers() -> str:
    """Consumers by folders: the largest deviation of the logits, or whether it works; a fault by its last line."""
    found = load("consumers")
    rows = {**found["consumers"], **found["others"]}
    folders = list(dict.fromkeys(folder for row in rows.values() for folder in row))
    lines = [f"| | {' | '.join(folders)} |", f"|---{'|---' * len(folders)}|"]
    for consumer, row in rows.items():
        cells = []
        for folder in folders:
            cell = row.get(folder, {})
            deviation = cell.get("largest_logit_deviation")
            works = "works" if deviation is None else "equal" if not deviation else f"{deviation:.0e}"
            cells.append("" if not cell else works if cell["works"] else "fails")
        lines.append(f"| {consumer} | {' | '.join(cells)} |")
    return "\n".join((*lines, ""))


def table(found: list[tuple[str, str, str]]) -> str:
    lines = [f"| {what} | {result} | `{command}` |" for what, result, command in found]
    return "\n".join(("| what | result | command |", "|---|---|---|", *lines, ""))


def tables() -> dict[str, str]:
    """Each table by the line of the README under which it stands."""
    begin = "<!-- {} made by `python -m benchmarks.readme` -->\n"
    made = {"table": table(rows()), "speed": table(speed()), "levers": levers(), "readers": readers()}
    return {begin.format(name): text for name, text in made.items()}


def main() -> None:
    path = ROOT / "README.md"
    for begin, text in tables().items():
        before, rest = path.read_text(encoding="utf-8").split(begin)
        path.write_text(before + begin + text + END + rest.split(END, 1)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
