"""How the tests start the scripts: under torchrun, or many calls of one process each at the cost of one import."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from recipe import LAUNCHER

from benchmarks.record import provenance, write

ROOT = Path(__file__).parents[2]
TIMEOUT = 600  # seconds
ENDING = 30  # seconds that a process has to end by itself after SIGTERM


@dataclass
class Run:
    """What a call has left."""

    output: Path
    status: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]

    @property
    def logs(self) -> dict[int, dict]:
        """What was logged in each optimizer step."""
        path = max(self.output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        history = json.loads((path / "trainer_state.json").read_text())["log_history"]
        return {entry["step"]: entry for entry in history if "loss" in entry}

    @property
    def eval_losses(self) -> dict[int, float]:
        """Loss over the rows to answer at each step at which it was measured."""
        history = json.loads((self.output / "trainer_state.json").read_text())["log_history"]
        return {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.logs.values()]

    def evaluation(self, stage: str) -> dict:
        return json.loads((self.output / f"eval_{stage}.json").read_text(encoding="utf-8"))


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    # CUDA_VISIBLE_DEVICES: these tests are about the CPU, on a machine with a GPU too.
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def finish(
    command: list[str],
    folder: Path,
    log: Path | None = None,
    meanwhile: Callable[[subprocess.Popen], None] | None = None,
) -> subprocess.CompletedProcess:
    """Runs a command to its end, output captured or in the file `log`; leaves no process behind if that takes too long.

    `meanwhile` is called with the process as soon as it runs.
    """
    with ExitStack() as stack:
        pipe = stack.enter_context(open(log, "w")) if log else subprocess.PIPE
        options = {"stdout": pipe, "stderr": pipe, "text": True, "env": environment(), "cwd": folder}
        process = subprocess.Popen(command, start_new_session=True, **options)
        try:
            if meanwhile:
                meanwhile(process)
            stdout, stderr = process.communicate(timeout=TIMEOUT)
        except BaseException:
            _end(process)
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _end(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started, of which none must outlive it and keep the machine busy."""
    # Noted first: torchrun's workers have sessions of their own, and without torchrun nobody's children are they any more.
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDING)
        for each in started:
            with suppress(psutil.NoSuchProcess):
                each.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()


def call(command: list[str], output: Path, **options) -> Run:
    done = finish(command, output.parent, **options)
    return Run(output, done.returncode, done.stdout, done.stderr)


def script(task: str) -> str:
    return str(ROOT / f"finetune_hf_trainer_{task}.py")


def torchrun(
    output: Path,
    *flags: str,
    ranks: int = 2,
    task: str | Path = "docvqa",
    options: Sequence[str] = (),
    **finish_options,
) -> Run:
    """Runs a task's script under torchrun (with its own `options`), with --output_dir `output`; `task` may be a script's path."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    launcher += [f"--master_port={free_port()}", *options]
    return call(
        [*launcher, str(task) if isinstance(task, Path) else script(task), "--output_dir", str(output), *flags],
        output,
        **finish_options,
    )


def python(output: Path, *flags: str) -> Run:
    """Runs the DocVQA script by plain python: one process."""
    return call([sys.executable, script("docvqa"), "--output_dir", str(output), *flags], output)


def several(
    calls: dict[str, list[str]],
    folder: Path,
    paths: dict[str, Path] | None = None,
    at_once: int = 2,
    ranks: int = 1,
) -> dict[str, Run]:
    """Runs a script (the DocVQA one, or that of `paths`) once for each entry, on `ranks` processes; name -> Run.

    Its --output_dir is `folder` / name, unless given.
    """
    listed, names = [], {name: re.sub(r"\W+", "-", name) for name in calls}
    assert len(set(names.values())) == len(calls)
    for name, flags in calls.items():
        argv = list(flags) if "--output_dir" in flags else ["--output_dir", str(folder / names[name]), *flags]
        path = str((paths or {}).get(name, script("docvqa")))
        listed.append({"script": path, "argv": argv, "output": str(folder / names[name]), "ranks": ranks})
    (folder / "calls.json").write_text(json.dumps(listed))
    command = [sys.executable, str(Path(__file__).parent / "several.py"), str(folder / "calls.json"), str(at_once)]
    # Not captured: a call that dies in a bad way must not keep a pipe open.
    finish(command, folder, log=folder / "several.log").check_returncode()
    runs = {}
    for name, file in names.items():
        output = folder / file
        status, stdout, stderr = (output.with_name(file + end).read_text() for end in (".status", ".out", ".err"))
        runs[name] = Run(output, int(status), stdout, stderr)
    return runs


def record_bad_inputs(path: Path, runs: dict[str, Run], folder: str) -> None:
    """Adds the line that each bad input got to a result file; `folder` becomes DIR in it, also where it is cut short."""
    said = json.loads(path.read_text())["bad_inputs"] if path.exists() else {}
    for name, run in runs.items():
        said[name] = {"status": run.status, "line": _without(folder, (run.errors or [""])[0])}
    write(path, provenance("torch", "transformers") | {"bad_inputs": said})


def _without(folder: str, line: str) -> str:
    """The line without the name of a temporary folder; a path inside a list is shortened in its middle, `/tmp/pyt.../0.png`."""
    line = line.replace(folder, "DIR")
    return re.sub(r"(/[^\s'\"]+?)\.\.\.", lambda found: "DIR..." if folder.startswith(found[1]) else found[0], line)
