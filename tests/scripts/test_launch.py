"""What starts the scripts in these tests leaves no process behind, and records lines without names of temporary folders."""

import json
import sys

import launch
import psutil
import pytest
from launch import Run

# Ignores SIGTERM, as a process does that is stuck; its child has a session of its own, as torchrun's workers have.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(100)
"""


def test_a_call_that_is_given_up_leaves_no_process_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "ENDING", 0.5)
    started = []

    def give_up(process):
        started.extend([psutil.Process(process.pid), psutil.Process(int(process.stdout.readline()))])
        raise KeyboardInterrupt  # as the time limit of pytest: in the middle of whatever is done

    with pytest.raises(KeyboardInterrupt):
        launch.finish([sys.executable, "-c", STUBBORN], tmp_path, meanwhile=give_up)
    assert len(started) == 2
    _, left = psutil.wait_procs(started, timeout=10)
    # Nobody may be there who asks for an orphan's exit status.
    assert not [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_lines_are_recorded_without_the_temporary_folder(tmp_path):
    folder = "/tmp/pytest-of-someone/pytest-0/bad0"
    lines = {
        "whole": f"error: {folder}/rows.jsonl:3: id: ...",
        "cut short": "error: x: found a list ['/tmp/pytest-.../images/0.png'] and a text ('a/b...c')",
        "another": "error: /etc/pass...: no folder of the test",
    }
    runs = {name: Run(tmp_path, 2, "", line) for name, line in lines.items()}
    launch.record_bad_inputs(tmp_path / "said.json", runs, folder)
    said = {
        name: entry["line"] for name, entry in json.loads((tmp_path / "said.json").read_text())["bad_inputs"].items()
    }
    assert said["whole"] == "error: DIR/rows.jsonl:3: id: ..."
    assert said["cut short"] == "error: x: found a list ['DIR.../images/0.png'] and a text ('a/b...c')"
    assert said["another"] == lines["another"]
