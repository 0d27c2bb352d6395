"""One clear line for what ends a run early: bad input, a signal, a full disk, another rank's death."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable

# Not the input's fault, and not a fault of the code either: nothing to be learned from a traceback.
SURROUNDINGS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENFILE)
LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "recvValueWithTimeout")


class InputError(Exception):
    """What the user gave cannot be used. The message is one line: expected, found, where, and what to do."""


class RunError(Exception):
    """A run cannot go on; its checkpoints are good. The message is one line."""


class Stopped(Exception):
    """A signal asked the run to stop, and all that it needs to go on is written.

    Args:
        signum (int): the signal.
        state (str): what is written, as the end of a sentence.
    """

    def __init__(self, signum: int, state: str):
        super().__init__(f"stopped by {signal.Signals(signum).name}: {state}; the same command goes on from there")
        self.signum = signum


def run(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what ends it early becomes one line on stderr and an exit status.

    2 for an `InputError`; 1 for a `RunError`, a lack of memory, disk or file descriptors, or another rank's death; 143 or
    130 after a checkpoint for SIGTERM or SIGINT (torchrun itself then exits with 1).
    """
    try:
        main()
        _leave()
    except SystemExit:
        _leave()
        raise
    except Stopped as error:
        # All ranks stop together: the first one says it.
        _exit(str(error) if os.environ.get("RANK", "0") == "0" else "", 128 + error.signum, first=False)
    except KeyboardInterrupt:
        _exit("stopped by SIGINT before training: nothing was lost", 130)
    except InputError as error:
        # A DataLoader worker's error arrives wrapped in its traceback; the message itself is the last line.
        line = str(error).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.InputError: ")
        _exit(f"error: {line}", 2)
    except RunError as error:
        _exit(f"error: {error}", 1)
    except (OSError, RuntimeError) as error:
        line = _explain(error)
        if line is None:
            raise
        _exit(f"error: {line}", 1)


def _explain(error: Exception) -> str | None:
    """One line for an error that is neither the input's fault nor the code's; None for any other."""
    first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
    # Not imported here: the converter needs no torch, and takes seconds less without.
    torch = sys.modules.get("torch")
    if torch and isinstance(error, torch.OutOfMemoryError):
        return f"{first} What lowers it most: --batch_size_per_gpu 1, a smaller --num_crops, --freeze_vision_model, --use_lora"
    if isinstance(error, OSError) and error.errno in SURROUNDINGS:
        return f"{first}; the checkpoints that are there are good: with the cause removed the same command goes on"
    if "EADDRINUSE" in str(error):
        return f"MASTER_PORT {os.environ.get('MASTER_PORT')} is taken by another program; choose another (torchrun --master_port)"
    # An OSError with these words is another pipe, such as that of `| head`.
    lost = isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_RANK)
    if lost or (torch and isinstance(error, torch.distributed.DistError)):
        return f"lost contact with the other processes ({first}); what the first of them to end says is the cause"
    return None


def _leave() -> None:
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_initialized():
        # A rank that ends with its threads running may abort (one in six did with gloo), and torchrun would then end the
        # ones that still work.
        torch.distributed.destroy_process_group()


def _exit(line: str, status: int, first: bool = True) -> None:
    if first and os.environ.get("LOCAL_RANK", "0") != "0":
        # All ranks find the same fault: let the first one say it. torchrun ends the others when it has exited; an error
        # that only this rank met is said after the wait.
        time.sleep(5)
    if line:
        print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: it would wait for collectives and workers that no longer get an answer.
    os._exit(status)
