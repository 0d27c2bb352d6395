"""Runs a script and kills its process, as `kill -9` does, at a moment that is hard to hit from outside.

    python kill_at.py MOMENT SCRIPT [flags]

MOMENT is one of `MOMENTS`.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import transformers  # noqa: E402

from finetuning.results import answering, evaluation, page  # noqa: E402
from finetuning.training import callbacks, checkpoint, resume, trainer  # noqa: E402


def die() -> None:
    if os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def before(place, name: str, call: int = 1, when=lambda *_: True) -> None:
    """Dies when a function is called for the `call`-th time with such arguments."""
    function, calls = getattr(place, name), []

    def dying(*args, **kwargs):
        if when(*args):
            calls.append(1)
            if len(calls) == call:
                die()
        return function(*args, **kwargs)

    setattr(place, name, dying)


def after(place, name: str) -> None:
    function = getattr(place, name)

    def dying(*args, **kwargs):
        result = function(*args, **kwargs)
        die()
        return result

    setattr(place, name, dying)


class HalfWritten:
    """A file whose `call`-th write ends in the middle, inside a letter of several bytes if there is one."""

    def __init__(self, file, call: int):
        self.file, self.call = file, call

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def flush(self):
        self.file.flush()

    def write(self, text: str):
        self.call -= 1
        if self.call:
            return self.file.write(text)
        content = text.encode()
        cut = next((place for place, byte in enumerate(content) if byte >= 0xC0), len(content) // 2) + 1
        self.file.flush()
        os.write(self.file.fileno(), content[:cut])
        die()
        return None


def in_a_line(stage: str, call: int):
    def arrange():
        generate = evaluation.generate_answers

        def of_this_stage(model, dataset, args, now):
            def half(path, *args, **kwargs):
                file = open(path, *args, **kwargs)  # noqa: SIM115, HalfWritten closes it
                return HalfWritten(file, call) if now == stage and path != os.devnull else file

            answering.open = half
            return generate(model, dataset, args, now)

        evaluation.generate_answers = of_this_stage

    return arrange


def is_manifest(path) -> bool:
    return Path(path).name.startswith(checkpoint.MANIFEST)


MOMENTS = {
    "before the run is marked": lambda: before(resume, "write_run"),
    "in the first line of an answer before training": in_a_line("before", 1),
    "in a later line of an answer before training": in_a_line("before", 2),
    # the first call is the check before the model loads
    "scoring before training": lambda: before(evaluation, "_score", 2),
    "between answers and the first step": lambda: before(transformers.Trainer, "train"),
    "in the first step": lambda: before(callbacks.NonFiniteCheck, "on_pre_optimizer_step"),
    "saving, the weights written": lambda: before(transformers.Trainer, "_save_optimizer_and_scheduler"),
    "saving the second checkpoint, the weights written": lambda: before(
        transformers.Trainer, "_save_optimizer_and_scheduler", 2
    ),
    "saving, before the state": lambda: before(transformers.TrainerState, "save_to_json"),
    "sealing, before anything": lambda: before(callbacks, "seal"),
    "sealing, the manifest not renamed": lambda: before(checkpoint, "_sync", 1, is_manifest),
    "sealing the second checkpoint, the manifest not renamed": lambda: before(checkpoint, "_sync", 2, is_manifest),
    "before older checkpoints go": lambda: before(callbacks, "rotate_checkpoints", 2),
    "after older checkpoints went": lambda: after(callbacks, "rotate_checkpoints"),
    "before the final save": lambda: before(trainer.RecipeTrainer, "save_model", 1, lambda *args: len(args) == 1),
    "final save, the weights written": lambda: before(transformers.Trainer, "save_state"),
    "final save, not sealed": lambda: before(trainer, "seal"),
    "in a line of an answer after training": in_a_line("after", 1),
    "scoring after training": lambda: before(evaluation, "_score", 3),
    "in the report": lambda: before(page.jinja2.Environment, "get_template"),
    "the report not renamed": lambda: before(Path, "replace", 1, lambda path, _: path.name == "report.html.part"),
}


def main(moment: str, script: str, *flags: str) -> None:
    MOMENTS[moment]()
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
