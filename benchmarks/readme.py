"""Writes what README and docs/ say of figures and flags, from the result files and from --help; a test holds them together.

python -m benchmarks.readme
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from finetuning.arguments import GROUPS, RecipeArguments, _Parser
from finetuning.own_data_arguments import OwnDataArguments

from .record import RESULTS, ROOT

END = "<!-- end -->\n"
# The published names, where transformers' own come first in --help.
PUBLISHED = {
    "per_device_train_batch_size": "batch_size_per_gpu",
    "weight_decay": "wd",
    "disable_tqdm": "no-tqdm",
}
# Flags whose default follows from others, and flags of transformers, whose own help is longer than a line.
WORDS = {
    "fp16": "float16 with loss scaling; `--fp16 False`: float32 (default: on a GPU without --bf16)",
    "do_train": "`--do_train False`: answer and score only, train nothing (default: on)",
    "eval_strategy": "when rows are answered while it trains: no, steps or epoch",
    "eval_steps": "optimizer steps between two evaluations (default: logging_steps)",
    "metric_for_best_model": "figure that the best checkpoint has most of (loss: least), such as anls or accuracy (default: loss)",
    "load_best_model_at_end": "end with the best checkpoint's weights",
}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def largest_logit_deviation() -> float:
    deviations = load("parity")["deviations"]
    return max(deviation["largest"] for name, deviation in deviations.items() if "logit" in name or "last16" in name)


def interruptions() -> dict[str, Any]:
    """The kills, the seconds of each SIGTERM until the exit, how many runs there were and how many ended as if undisturbed."""
    found = load("interrupt")
    parts = [found[name] for name in ("full", "lora")]
    ends = [end for part in parts for end in (*part["ends"], *part["stops"])]
    return {
        "kills": [kill for part in parts for kill in part["kills"]],
        "stops": [stop["seconds_until_exit"] for part in parts for stop in part["stops"]],
        "rank": max(part["rank_killed"]["seconds_until_all_ended"] for part in parts),
        "runs": len(ends),
        "equal": sum(all(value for key, value in end.items() if key.endswith("_equal")) for end in ends),
    }


def first() -> str:
    """The lines of the README's first screen; each names its file."""
    step, demo = load("train_step_ratios")["cases"]["full photo"], load("demo")["strategies"]["full"]
    ended, bad = interruptions(), load("bad_inputs")["bad_inputs"]
    single = sum(found["status"] == 2 and len(found["line"].splitlines()) == 1 for found in bad.values())
    lines = {
        "parity": "**Native**: the published recipe's model is remote code, which current transformers breaks. This one is composed of "
        "transformers' own CLIP and Phi3 classes, reads and writes the official weights under their names, and equals the official "
        f"code: logits to {largest_logit_deviation():.1e} in float32",
        "train_step_ratios": f"**Lighter**: a full fine-tuning step on a photo takes {step['seconds']['ratio']:.2f} of the time and "
        f"{step['memory_step']['ratio']:.2f} of the memory of the official way, for a 172 M-parameter model on two CPU cores",
        "interrupt": f"**A stop loses nothing**: after {len(ended['kills'])} kills and {len(ended['stops'])} SIGTERMs, "
        f"{ended['equal']} of {ended['runs']} runs ended with the weights, losses and answers of an undisturbed one",
        "bad_inputs": f"**A fault is one line**: {single} of {len(bad)} bad rows, files and flags get one that says what was expected, "
        "what was found, where, and what to do",
        "demo": f"**A first success without a GPU**: `make demo` goes from ANLS {demo['anls_before']:.2f} to {demo['anls_after']:.2f} on "
        f"pages that it has not seen, in {demo['train_seconds']:.0f} s of training on two CPU cores",
    }
    return "".join(f"- {line} ([{name}.json](benchmarks/results/{name}.json)).\n" for name, line in lines.items())


def flags() -> str:
    """The flags of the recipe, in the groups of --help, with those of the script for one's own data."""
    shared, own = (
        {action.dest: action for action in _Parser(kind)._actions} for kind in (RecipeArguments, OwnDataArguments)
    )
    actions = own | shared
    lines = []
    for title, names in GROUPS.items():
        lines += [f"### {title.capitalize()}", "", "| flag | default | meaning |", "|---|---|---|"]
        for name in names:
            help = WORDS.get(name) or " ".join(str(actions[name].help).split()).replace("%%", "%")
            said = re.search(r" \(default: ([^)]*)\)", help)
            default = said[1] if said else show_default(actions[name].default)
            meaning = help.replace(said[0], "") if said else help
            meaning = meaning if name in shared else f"finetune_hf_trainer_own_data.py: {meaning}"
            lines.append(f"| `--{PUBLISHED.get(name, name)}` | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def show_default(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "on" if value else "off" if value is False else ""
    text = f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("e-0", "e-")


def rows() -> list[tuple[str, str, str]]:
    """What was measured, the result, and the command that wrote the file of that name."""
    deviations = load("parity")["deviations"]
    parity = (
        f"logits {largest_logit_deviation():.1e}, loss {deviations['loss, eager']['largest']:.1e}, gradient norms "
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
    ended, cost = interruptions(), load("checkpoint_cost")
    phases = ", ".join(
        f"{count} {phase}" for phase, count in Counter(kill["phase"] for kill in ended["kills"]).most_common()
    )
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
            f"{len(ended['kills'])} kills (-9) of two-process runs, full and LoRA ({phases}), and {len(ended['stops'])} SIGTERMs: runs that ended "
            "with the weights, losses and answers of an undisturbed one",
            f"{ended['equal']} of {ended['runs']}; {max(ended['stops'])} s at most from SIGTERM to exit, {ended['rank']} s from the death of a rank",
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
    """Counts of the official sizes; time and memory of the medium model over its base's, with the noise of each base, where
    they were measured."""
    entries = load("levers")["levers"]
    timed = any("time" in entry for entry in entries)
    columns = ["lever", "TFLOP", "GB", *(["time", "memory"] if timed else []), ""]
    lines = [f"| {' | '.join(columns)} |", f"{'|---' * len(columns)}|"]
    for entry in entries:
        is_base = entry["lever"] == entry["base"]
        counts = [f"{entry[name]:.1f}" if name in entry else "" for name in ("tflop", "gb")]
        ratios = [f"{entry[name]:.2f}" if name in entry else "" for name in ("time", "memory")]
        if is_base:
            ratios = [f"1 ± {entry['noise']:.2f}", "1"] if "noise" in entry else ["", ""]
        words = f"**{entry['lever']}**" if is_base else entry["lever"]
        lines.append(f"| {' | '.join((words, *counts, *(ratios if timed else []), entry['verdict']))} |")
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


def startup() -> str:
    """Seconds, of them of computing, and memory of a start before a model is loaded, before rows stayed in their files and since."""
    found = load("startup")
    lines = [
        "| rows | when | seconds, of them computing | GB a process at most, its own at the end |",
        "|---|---|---|---|",
    ]
    for case in found["after"]["cases"]:
        for turn in ("first", "second"):
            for label, when in (("before", "formerly"), ("after", "now")):
                figures = found[label]["cases"][case][turn]
                computing = f", {figures['cpu_seconds']:.1f}" if "cpu_seconds" in figures else ""
                own = f", {figures['own_gb']:.2f}" if "own_gb" in figures else ""
                start = f"{turn} start, {when}"
                lines.append(
                    f"| {case} | {start} | {figures['seconds']:.1f}{computing} | {figures['peak_gb']:.2f}{own} |"
                )
    return "\n".join((*lines, ""))


def doubts() -> str:
    """Swapped answers among the first rows of `finetuning.doubts`, with and without folds, beside a random order."""
    found = load("doubts")
    lines = [
        "| swapped answers | judged by | in the first 5% | in the first 10% | seconds | GB a process |",
        "|---|---|---|---|---|---|",
    ]
    titles = {"demo": "demo", "demo_lora": "demo, with LoRA", "receipts": "receipts"}
    judges = {"without_folds": "the model that was trained on them", "with_folds": "`--folds 2`, training included"}
    for title, runs in ((title, found[name]) for name, title in titles.items() if name in found):
        seeds = f", mean of {len(runs)} seeds" if len(runs) > 1 else ""
        for judge, words in judges.items():
            measured = [run[judge] for run in runs]
            shares = [sum(each["found_in_worst"][worst] for each in measured) / len(runs) for worst in ("5%", "10%")]
            seconds = sum(each["seconds"] for each in measured) / len(runs)
            memory = max(each["largest_process_mb"] for each in measured) / 1024
            cells = [f"{title}, {runs[0]['swapped']} of {runs[0]['rows']:,}{seeds}", words]
            cells += [*(f"{share:.1%}" for share in shares), f"{seconds:.0f}", f"{memory:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"| | a random order | {' | '.join(f'{share:.0%}' for share in found['random_order'].values())} | | |")
    return "\n".join((*lines, ""))


def hardware() -> str:
    """What the planner recommends for usual machines, as benchmarks/plan.py has recorded it."""
    lines = [
        "| GPUs | planned peak, of what can be allocated | after `torchrun --nproc_per_node=<GPUs>` |",
        "|---|---|---|",
    ]
    for name, row in load("plan")["hardware"].items():
        words = row["command"].split(" ", 2)[2]
        lines.append(f"| {name} | {row['peak_gib']:.1f} of {row['usable_gib']:.1f} GiB | `{words}` |")
    return "\n".join((*lines, ""))


def plan_accuracy() -> str:
    found = load("plan")
    return (
        f"Against {len(found['settings'])} steps of all layers in full size, on fake tensors, the planned peaks are at most "
        f"{found['largest deviation']:.1%} off, {found['mean deviation']:.1%} on average; a plan takes "
        f"{found['planner_seconds']['processor']:.0f} s of a processor, most of it imports "
        "([plan.json](../benchmarks/results/plan.json)).\n"
    )


def table(found: list[tuple[str, str, str]]) -> str:
    lines = [f"| {what} | {result} | `{command}` |" for what, result, command in found]
    return "\n".join(("| what | result | command |", "|---|---|---|", *lines, ""))


# Each part that is made stands below a line with its name, in README or in a file of docs/.
def trl() -> str:
    """Preferences and rewards: figures over pages held back, and the mean of the first and of the last ten steps of training."""
    found, lines = (
        load("trl"),
        [
            "| script | figure | held back, before | after | first steps of training | last |",
            "|---|---|---|---|---|---|",
        ],
    )
    for name, figures in (("dpo", ("rewards/margins", "rewards/accuracies")), ("grpo", ("reward",))):
        run = found[name]
        for figure in figures:
            held_out = [run["held_out"][stage][figure] for stage in ("before", "after")]
            ends = [sum(part) / len(part) for part in (run[figure][:2], run[figure][-2:])]
            values = " | ".join(f"{value:.2f}" for value in (*held_out, *ends))
            lines.append(f"| {run['script']} | {figure} | {values} |")
    return "\n".join(lines) + "\n"


PARTS = {
    "first": first,
    "flags": flags,
    "table": lambda: table(rows()),
    "speed": lambda: table(speed()),
    "levers": levers,
    "readers": readers,
    "startup": startup,
    "doubts": doubts,
    "hardware": hardware,
    "plan": plan_accuracy,
    "trl": trl,
}
BEGIN = "<!-- {} made by `python -m benchmarks.readme` -->\n"


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    for name, make in PARTS.items():
        begin = BEGIN.format(name)
        (path,) = (path for path in documents() if begin in path.read_text(encoding="utf-8"))
        before, rest = path.read_text(encoding="utf-8").split(begin)
        path.write_text(before + begin + make() + END + rest.split(END, 1)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
