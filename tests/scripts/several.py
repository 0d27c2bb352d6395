"""Runs the DocVQA script several times, each in a process of its own, but imports it only once.

    python several.py CALLS.json

CALLS.json holds [{"argv", "output"}]; output + .out, .err and .status receive what each call leaves. The imports are most of
the time that so small a run takes.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import finetune_hf_trainer_docvqa as script  # noqa: E402
from finetuning.errors import run  # noqa: E402

AT_ONCE = 2


def start(argv: list[str], output: str) -> int:
    process = os.fork()
    if process:
        return process
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = [script.__file__, *argv]
    try:
        run(script.main)
        sys.exit()
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(path: str) -> None:
    calls, running = json.loads(Path(path).read_text()), {}
    while calls or running:
        if calls and len(running) < AT_ONCE:
            call = calls.pop(0)
            running[start(call["argv"], call["output"])] = call["output"]
            continue
        process, status = os.wait()
        Path(running.pop(process) + ".status").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main(sys.argv[1])
