"""One clear line for what ends a run early, and a short traceback for a fault of the script's own functions."""

import atexit
import errno
import json
import os
import re
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# Neither the input's fault nor the code's: nothing is learned from a traceback.
ENVIRONMENT_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
}
# gloo is C++: the source file that raised the error stands at the start of the message.
GLOO_ORIGIN = re.compile(r"\[[^\]]*gloo/[^\]]*:\d+\]")
LIBRARIES = tuple(
    os.path.join(os.path.realpath(str(folder)), "")
    for folder in (
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        Path(__file__).parent,
        Path(__file__).parents[1] / "phi3v",
    )
)


class InputError(Exception):
    """What the user gave cannot be used. The message is one line: expected, found, where, and what to do."""


class RunError(Exception):
    """A run cannot go on; its checkpoints are good. The message is one line."""


class ScriptError(Exception):
    """A function of the script (`load_splits`, `to_conversation`, `score`) failed.

    The message holds a traceback of the script's own frames and, where it is known, the row.
    """


class Stopped(Exception):
    """A signal asked the run to stop, and all that it needs to go on is written.

    Args:
        signum (int): the signal.
        state (str): what is written, as the end of a sentence.
    """

    def __init__(self, signum: int, state: str):
        super().__init__(f"stopped by {signal.Signals(signum).name}: {state}; the same command goes on from there")
        self.signum = signum


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what ends it early becomes one line on stderr and an exit status.

    2 for an `InputError`; 1 for a `RunError`, a fault of the script's own functions (a short traceback of their frames), a
    lack of memory, disk or file descriptors, or another rank's death; 143 or 130 after a checkpoint for SIGTERM or SIGINT.
    torchrun itself then exits with 1 and shows the error of the first process that failed.
    """
    try:
        _recorded(main)()
        _leave_process_group()
        _end_process()
    except SystemExit:
        _leave_process_group()
        raise
    except Stopped as error:
        # All ranks stop together: the first one says it.
        _exit(str(error) if os.environ.get("RANK", "0") == "0" else "", 128 + error.signum, first=False)
    except KeyboardInterrupt:
        _exit("stopped by SIGINT before training: nothing was lost", 130)
    except InputError as error:
        _exit(f"error: {_worker_message(error)}", 2)
    except RunError as error:
        _exit(f"error: {error}", 1)
    except ScriptError as error:
        _exit(str(error), 1)
    except Exception as error:
        found = describe_script_error(error)
        if found is None:
            line = _explain(error)
            found = line and f"error: {line}"
        if found is None:
            raise
        _exit(found, 1)


def describe_script_error(error: BaseException, where: str = "") -> str | None:
    """A short traceback of the frames of the script, if the error came up in one of its own functions.

    Args:
        error (BaseException): as caught.
        where (str): what the function was given, such as a row's id and line.

    Returns:
        str | None: None for an error that a library raised while `main` called it.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_own(frame.filename)]
    # `main` itself stands in the script too: an error that comes up below it, in a library, is none of the script's.
    inside = [frame for frame in own if frame.name not in ("main", "<module>")]
    if not inside and not (own and frames[-1] is own[-1]):
        return None
    shown = inside or own[-1:]
    name = f"{shown[0].name} of {os.path.basename(shown[0].filename)}"
    lines = [f"error in {name}{where and f', given {where}'}:", *traceback.format_list(shown)]
    lines += traceback.format_exception_only(error)
    return "\n".join(line.rstrip("\n") for line in lines)


def _is_own(filename: str) -> bool:
    return not filename.startswith("<") and not os.path.realpath(filename).startswith(LIBRARIES)


def _recorded(main: Callable[[], None]) -> Callable[[], None]:
    """`main`, wrapped so that torchrun shows the error of the first process that failed."""
    # Not imported here: the converter needs no torch, and takes seconds less without.
    if "torch" not in sys.modules:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(main)


def _worker_message(error: InputError) -> str:
    # A DataLoader worker's error arrives wrapped in its traceback; the message itself is the last line.
    return str(error).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.InputError: ")


def _explain(error: Exception) -> str | None:
    """One line for an error that is neither the input's fault nor the code's, by its type and origin; None for any other."""
    first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
    torch = sys.modules.get("torch")
    origin = _origin(error)
    if torch and isinstance(error, torch.OutOfMemoryError):
        return f"{first} What lowers it most: --batch_size_per_gpu 1, a smaller --num_crops, --freeze_vision_model, --use_lora"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return (
            f"out of main memory ({first}); fewer --dataloader_num_workers, a smaller --num_crops or a machine with more "
            "memory helps; the same command goes on from the last checkpoint"
        )
    if isinstance(error, OSError) and error.errno in ENVIRONMENT_ERRNOS:
        return f"{first}; the checkpoints that are there are good: with the cause removed the same command goes on"
    if isinstance(error, RuntimeError) and origin[0].endswith("threading.py"):
        return f"{first}: no more threads or processes are allowed here; raise the limit (ulimit -u), or --dataloader_num_workers 0"
    if any(path.endswith(os.path.join("data", "_utils", "signal_handling.py")) for path in origin):
        return (
            f"a process that prepares images was killed ({first}): out of memory, or of shared memory (docker run --ipc=host, "
            "or --shm-size=8g); --dataloader_num_workers 0 needs neither; the same command goes on from the last checkpoint"
        )
    if torch and isinstance(error, torch.distributed.DistNetworkError) and "EADDRINUSE" in str(error):
        return f"MASTER_PORT {os.environ.get('MASTER_PORT')} is taken by another program; choose another (torchrun --master_port)"
    lost = isinstance(error, RuntimeError) and GLOO_ORIGIN.match(str(error))
    if lost or (torch and isinstance(error, torch.distributed.DistError)):
        return f"lost contact with the other processes ({first}); what the first of them to end says is the cause"
    return None


def _origin(error: BaseException | None) -> list[str]:
    """Files of the frames that an error came through, the innermost first, and then of those that it was raised from."""
    found = []
    while error is not None:
        found += [frame.filename for frame in traceback.extract_tb(error.__traceback__)][::-1]
        error = error.__cause__
    return found or [""]


def _leave_process_group() -> None:
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_initialized():
        # A rank that ends with its threads running may abort (one in six did with gloo), and torchrun would then end the
        # ones that still work.
        torch.distributed.destroy_process_group()


def _tell_torchrun(text: str) -> None:
    """Has torchrun show this text in place of the traceback that `record` has noted."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and os.path.exists(path):
        message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message}, file)


def _end_process() -> None:
    """Ends one of several processes at once, its work done.

    With threads of gloo or of a library still about, C++ may abort a process that ends the usual way (seen in one of about
    forty runs, after `destroy_process_group` too), and torchrun would then call the whole run failed.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _exit(text: str, status: int, first: bool = True) -> None:
    _tell_torchrun(text)
    if first and os.environ.get("LOCAL_RANK", "0") != "0":
        # All ranks find the same fault: let the first one say it. torchrun ends the others when it has exited; an error
        # that only this rank met is said after the wait.
        time.sleep(5)
    if text:
        print(text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: it would wait for collectives and workers that no longer get an answer.
    os._exit(status)
