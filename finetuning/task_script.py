"""The script of a task, for commands that work with any of them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .data.shown import printable
from .errors import InputError

ROOT = Path(__file__).parents[1]
TASKS = ("docvqa", "hateful_memes", "nlvr2", "ucf101", "own_data")
# Its rows are of the forms that `validate` and `plan` read without a script.
OWN_DATA = "own_data"


def load_script(task: str) -> ModuleType:
    """The script of a task, loaded from its file: no import, because scripts stand above this package.

    Args:
        task (str): one of `TASKS`, or the path of a script of one's own.

    Raises:
        InputError: if there is no such script, or it has no `to_conversation`.
    """
    path = Path(task) if task.endswith(".py") else ROOT / f"finetune_hf_trainer_{task}.py"
    if (not task.endswith(".py") and task not in TASKS) or not path.is_file():
        raise InputError(
            f"--task {printable(task)}: expected {', '.join(TASKS)} or the path of a script, found no such file"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, "a name that ends with .py has a loader"
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    # pydantic looks a model's annotations up by the name of its module.
    sys.modules[path.stem] = script
    spec.loader.exec_module(script)
    if not hasattr(script, "to_conversation"):
        raise InputError(f"--task {printable(task)}: expected a script with a function to_conversation, found none")
    return script
