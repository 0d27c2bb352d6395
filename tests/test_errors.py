"""What ends a run: one line and a status by the error's type and origin; a short traceback for the script's own functions."""

import errno
import multiprocessing
import os
import signal
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import recipe
import torch
from torch.utils.data import DataLoader, Dataset

from finetuning import errors
from finetuning.errors import InputError, RunError, ScriptError, Stopped, describe_script_error, run_script

own_process = pytest.fixture(autouse=True)(recipe.own_process)

SITE = Path(torch.__file__).parents[1]
TORCH = SITE / "torch" / "distributed" / "distributed_c10d.py"


class Ended(BaseException):
    pass


@pytest.fixture(autouse=True)
def no_real_end(monkeypatch):
    """Else a fault of `run` would end the tests themselves, without a word."""

    def end(status):
        raise Ended(status)

    monkeypatch.setattr(errors.os, "_exit", end)


@pytest.fixture
def ending(capsys):
    """`ending(main)`: exit status and what stands on stderr."""

    def call(main) -> tuple[int, str]:
        with pytest.raises(Ended) as ended:
            run_script(main)
        return ended.value.args[0], capsys.readouterr().err

    return call


def in_file(path: Path, source: str, **names):
    """`function` of a source that stands in `path`, as tracebacks tell it."""
    path.parent.mkdir(parents=True, exist_ok=True) if not path.exists() else None
    exec(compile(textwrap.dedent(source), str(path), "exec"), names)
    return names["function"]


def raised_in(path: Path, error: BaseException):
    """A `main` below which a file of a library raises the error."""
    function = in_file(path, "def function():\n    raise error\n", error=error)

    def main():
        function()

    return main


@pytest.fixture
def script(tmp_path):
    """`script(source)`: the function `main` of a user's script of this source."""

    def load(source: str):
        path = tmp_path / "finetune_hf_trainer_mine.py"
        path.write_text(textwrap.dedent(source))
        names = {}
        exec(compile(path.read_text(), str(path), "exec"), names)
        return names["main"]

    return load


# ---- one line by type and origin


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("expected a, found b"), 2, "error: expected a, found b"),
        (InputError(f"Caught InputError in worker\nTraceback:\n{InputError.__module__}.InputError: a, found b"), 2, "error: a, found b"),
        (RunError("it cannot go on"), 1, "error: it cannot go on"),
        (ScriptError("error in score"), 1, "error in score"),
        (Stopped(signal.SIGTERM, "checkpoint-3 is written"), 143, "stopped by SIGTERM: checkpoint-3 is written; the same command goes on from there"),
        (Stopped(signal.SIGINT, "checkpoint-3 is written"), 130, "stopped by SIGINT: checkpoint-3 is written; the same command goes on from there"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT before training: nothing was lost"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)  # fmt: skip
def test_our_own_errors_are_one_line(ending, error, status, line):
    assert ending(raised_in(TORCH, error)) == (status, f"{line}\n")


ENVIRONMENT = {
    "CUDA memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "--batch_size_per_gpu 1"),
    "main memory": (MemoryError(), "out of main memory"),
    "main memory, by numpy": (MemoryError("Unable to allocate 9 GiB"), "out of main memory (Unable to allocate 9 GiB)"),
    "ENOMEM": (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of main memory"),
    "ENOSPC": (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    "EDQUOT": (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
    "EROFS": (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    "EFBIG": (OSError(errno.EFBIG, "File too large"), "File too large"),
    "EACCES": (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    "EMFILE": (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
    "ENFILE": (OSError(errno.ENFILE, "Too many open files in system"), "Too many open files in system"),
    "EAGAIN of fork": (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "temporarily unavailable"),
    "port taken": (torch.distributed.DistNetworkError("port: 29500, EADDRINUSE, address already in use"), "--master_port"),
    "NCCL": (torch.distributed.DistBackendError("NCCL error"), "lost contact with the other processes (NCCL error)"),
    "a store": (torch.distributed.DistStoreError("wait timeout after 1800000ms"), "lost contact with the other processes"),
    "gloo": (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), "lost contact with the other processes"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENVIRONMENT)
def test_what_the_machine_lacks_is_one_line(ending, case):
    error, named = ENVIRONMENT[case]
    status, said = ending(raised_in(TORCH, error))
    assert status == 1
    (line,) = said.splitlines()
    assert line.startswith("error: ")
    assert named in line


def test_threads_that_cannot_be_started_are_one_line(ending):
    main = raised_in(Path(threading.__file__), RuntimeError("can't start new thread"))
    status, said = ending(main)
    assert status == 1
    (line,) = said.splitlines()
    assert line.startswith("error: can't start new thread: no more threads or processes are allowed here")
    assert "--dataloader_num_workers 0" in line


class Killed(Dataset):
    """Its worker is killed, as the kernel kills one for want of memory."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_loader_worker_is_one_line(ending, workers):
    def main():
        list(DataLoader(Killed(), num_workers=workers, batch_size=None))

    status, said = ending(main)
    assert status == 1
    (line,) = said.splitlines()
    assert line.startswith("error: a process that prepares images was killed (")
    assert "--ipc=host" in line
    assert "--dataloader_num_workers 0" in line


def test_a_killed_worker_that_the_signal_tells_of_is_one_line(ending):
    # SIGCHLD may come anywhere below main: in the model, as well as in the loader.
    path = SITE / "torch" / "utils" / "data" / "_utils" / "signal_handling.py"
    handler = in_file(
        path, "def function(*_):\n    raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.')\n"
    )
    layer = in_file(TORCH, "def function():\n    raise_it()\n", raise_it=handler)

    def main():
        layer()

    status, said = ending(main)
    assert status == 1
    assert said.startswith("error: a process that prepares images was killed (DataLoader worker (pid 7)")


# ---- what keeps its traceback


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a fault of ours"),
        RuntimeError("Broken pipe"),
        RuntimeError("Connection closed by peer"),
        RuntimeError("No space left on device"),
        RuntimeError("can't start new thread"),
        RuntimeError("EADDRINUSE"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        FileNotFoundError(2, "gone"),
        ZeroDivisionError(),
        ValueError("lost contact"),
    ],
    ids=repr,
)
def test_a_fault_of_a_library_keeps_its_traceback(error):
    with pytest.raises(type(error)) as caught:
        run_script(raised_in(TORCH, error))
    assert caught.value is error


def test_a_status_of_its_own_is_kept():
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: sys.exit(3))
    assert ended.value.code == 3
    assert run_script(lambda: sys.exit(0)) is None
    assert run_script(lambda: None) is None


# ---- the script's own functions


WORDS = [
    "Broken pipe", "No space left on device", "Connection closed by peer", "can't start new thread", "EADDRINUSE",
    "CUDA out of memory", "DataLoader worker (pid 7) is killed by signal: Killed.", "gloo", "Too many open files",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer",
]  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_what_a_message_says_decides_nothing(ending, script, words):
    main = script(f"""\
        def score(predictions):
            raise RuntimeError({words!r})


        def main():
            score([])
        """)
    status, said = ending(main)
    assert status == 1
    lines = said.splitlines()
    assert lines[0] == "error in score of finetune_hf_trainer_mine.py:"
    assert lines[1].endswith('finetune_hf_trainer_mine.py", line 2, in score')
    assert lines[2] == f"    raise RuntimeError({words!r})"
    assert lines[3] == f"RuntimeError: {words}"
    assert len(lines) == 4


def test_a_fault_shows_all_frames_of_the_script_and_no_others(ending, script):
    main = script("""\
        import json


        def load_splits(args):
            return parse("{")


        def parse(text):
            return json.loads(text)


        def main():
            load_splits(None)
        """)
    status, said = ending(main)
    lines = said.splitlines()
    assert status == 1
    assert lines[0] == "error in load_splits of finetune_hf_trainer_mine.py:"
    assert [line.split(", ")[1:] for line in lines if line.startswith("  File")] == [
        ["line 5", "in load_splits"],
        ["line 9", "in parse"],
    ]
    assert lines[-1].startswith("json.decoder.JSONDecodeError: ")
    assert "json/decoder.py" not in said


def test_a_library_that_fails_below_main_is_no_fault_of_the_script(script):
    main = script("""\
        import json


        def main():
            json.loads("{")
        """)
    with pytest.raises(ValueError, match="Expecting property name"):
        run_script(main)


def test_what_main_itself_does_wrong_is_the_scripts(ending, script):
    main = script("""\
        def main():
            rows = None
            print(len(rows))
        """)
    status, said = ending(main)
    assert status == 1
    assert said.splitlines()[0] == "error in main of finetune_hf_trainer_mine.py:"
    assert "    print(len(rows))" in said
    assert said.splitlines()[-1] == "TypeError: object of type 'NoneType' has no len()"


@pytest.mark.parametrize(
    ("error", "named"),
    [("FileNotFoundError(2, 'No such file', 'labels.csv')", "labels.csv"), ("MemoryError()", "MemoryError"), ("OSError(28, 'No space')", "[Errno 28]")],
)  # fmt: skip
def test_an_error_of_the_machine_in_the_scripts_own_function_shows_where(ending, script, error, named):
    main = script(f"""\
        def load_splits():
            raise {error}


        def main():
            load_splits()
        """)
    status, said = ending(main)
    assert status == 1
    assert said.startswith("error in load_splits of finetune_hf_trainer_mine.py:")
    assert named in said


@pytest.mark.parametrize(
    "folder", [SITE / "torch", Path(os.__file__).parent, Path(errors.__file__).parent / "data", Path(errors.__file__).parents[1] / "phi3v"]
)  # fmt: skip
def test_frames_of_libraries_and_of_the_machinery_are_not_the_scripts(folder):
    function = in_file(folder / "anything.py", "def function():\n    raise ValueError\n")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        function()
    # the frame of this very test is its own
    error = caught.value.with_traceback(caught.value.__traceback__.tb_next)
    assert describe_script_error(error) is None


def test_a_generated_frame_is_not_the_scripts():
    # as dataclasses and namedtuples make them
    function = in_file(Path("<string>"), "def function():\n    raise ValueError\n")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        function()
    assert describe_script_error(caught.value.with_traceback(caught.value.__traceback__.tb_next)) is None


def test_a_script_behind_a_link_is_its_own(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    function = in_file(tmp_path / "link" / "mine.py", "def function(row):\n    return row['x']\n")
    with pytest.raises(KeyError) as caught:
        function({})
    error = caught.value.with_traceback(caught.value.__traceback__.tb_next)
    text = describe_script_error(error, "rows.jsonl:7 (id a)")
    assert text.splitlines()[0] == "error in function of mine.py, given rows.jsonl:7 (id a):"
    assert text.splitlines()[-1] == "KeyError: 'x'"


# ---- ranks


@pytest.mark.parametrize(("local_rank", "waits"), [("0", 0), ("1", 1)])
def test_the_first_rank_says_it(ending, monkeypatch, local_rank, waits):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    status, said = ending(raised_in(TORCH, InputError("expected a, found b")))
    assert (status, said) == (2, "error: expected a, found b\n")
    assert len(waited) == waits


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_of_a_stop_that_all_ranks_share_one_tells(ending, monkeypatch, rank, lines):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(errors.time, "sleep", lambda _: pytest.fail("waited"))
    status, said = ending(raised_in(TORCH, Stopped(signal.SIGTERM, "checkpoint-3 is written")))
    assert status == 143
    assert len(said.splitlines()) == lines


def test_torchrun_is_told_the_error_of_the_process(tmp_path, monkeypatch, ending):
    # `record` writes it into the file that torchrun names.
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    ending(raised_in(TORCH, RunError("it cannot go on")))
    assert "it cannot go on" in (tmp_path / "error.json").read_text()


def test_workers_are_started_as_on_the_users_machine():
    assert multiprocessing.get_start_method() == "fork"  # else the tests of killed workers show another thing
