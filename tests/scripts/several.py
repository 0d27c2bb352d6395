"""Runs scripts several times, each in a process of its own, but imports what they need only once.

    python several.py CALLS.json [AT_ONCE]

CALLS.json holds [{"script", "argv", "output", "ranks"}]; output + .out, .err and .status receive what each call leaves. The imports are
most of the time that so small a run takes.
"""

import json
import os
import runpy
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import finetune_hf_trainer_docvqa  # noqa: E402, F401

AT_ONCE = 2


def start(call: dict) -> list[int]:
    """Starts the processes of a call; the exit status of the first one counts."""
    ranks = call.get("ranks", 1)
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    launcher = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    for file in (".out", ".err"):
        Path(call["output"] + file).write_bytes(b"")
    processes = []
    for rank in range(ranks):
        processes.append(os.fork())
        if not processes[-1]:
            if ranks > 1:
                os.environ.update({name: str(value) for name, value in launcher.items()})
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            run(call)
    return processes


def run(call: dict) -> None:
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(call["output"] + suffix, os.O_WRONLY | os.O_APPEND), stream)
    sys.argv = [call["script"], *call["argv"]]
    try:
        runpy.run_path(call["script"], run_name="__main__")
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
            first, *others = start(call)
            running[first] = call["output"], others
            continue
        process, status = os.wait()
        if process in running:
            output, others = running.pop(process)
            if status:
                # As torchrun does.
                for other in others:
                    with suppress(ProcessLookupError):
                        os.kill(other, signal.SIGKILL)
            Path(output + ".status").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
