"""One clear line, and exit status 2, for a bad call or bad data."""

import os
import sys
import time
from collections.abc import Callable

import torch.distributed as dist


class InputError(Exception):
    """What the user gave cannot be used. The message is one line: expected, found, where, and what to do."""


def run(main: Callable[[], None]) -> None:
    """Runs a script's `main`; an `InputError` becomes one line on stderr and exit status 2."""
    try:
        main()
        if dist.is_initialized():
            # A rank that ends with its threads running may abort (one in six did with gloo), and torchrun would then end the
            # ones that still work.
            dist.destroy_process_group()
    except InputError as error:
        # A DataLoader worker's error arrives wrapped in its traceback; the message itself is the last line.
        line = str(error).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.InputError: ")
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # All ranks find the same fault: let the first one say it. torchrun ends the others when it has exited; an
            # error that only this rank met is said after the wait.
            time.sleep(5)
        print(f"error: {line}", file=sys.stderr, flush=True)
        # Not sys.exit: it would wait for collectives and workers that no longer get an answer.
        os._exit(2)
