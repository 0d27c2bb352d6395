"""Runs scripts several times, each in a process of its own, but imports what they need only once.

    python several.py CALLS.json [AT_ONCE]

CALLS.json holds [{"script", "argv", "output"}]; output + .out, .err and .status receive what each call leaves. The imports are
most of the time that so small a run takes.
"""

import json
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import finetune_hf_trainer_docvqa  # noqa: E402, F401

AT_ONCE = 2


def start(script: str, argv: list[str], output: str) -> int:
    process = os.fork()
    if process:
        return process
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = [script, *argv]
    try:
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(path: str, at_once: int = AT_ONCE) -> None:
    calls, running = json.loads(Path(path).read_text()), {}
    while calls or running:
        if calls and len(running) < at_once:
            call = calls.pop(0)
            running[start(call["script"], call["argv"], call["output"])] = call["output"]
            continue
        process, status = os.wait()
        Path(running.pop(process) + ".status").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
