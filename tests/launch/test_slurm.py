"""The sbatch file on a real Slurm that the test sets up: cut by its time limit, requeued, ended as if nothing had happened.

`make test-slurm`; as root, on a machine with Debian's slurm-wlm and munge. Its two nodes are this machine twice.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from launch import ROOT, Run, environment, free_port, torchrun

from demo import build_data, build_model

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)), reason="needs root, slurm-wlm and munge"
    ),
]
LIMIT, NOTICE = 30, 90  # minutes, seconds
LIMITS = [f"--time={LIMIT}", f"--signal=B:USR1@{NOTICE}"]
PATIENCE = 1200  # seconds
# Some 45 seconds of training on an idle machine: Slurm looks at the limits every 30.
FLAGS = [
    *("--num_crops", "1", "--batch_size", "16", "--batch_size_per_gpu", "4", "--max_steps", "300", "--no-tqdm"),
    *("--learning_rate", "1e-3", "--logging_steps", "20", "--max_new_tokens", "4", "--dataloader_num_workers", "1"),
]
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire: a requeued job waits as long before it starts again.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
# No cgroups, no accounting.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES OverTimeLimit=0
"""


class Slurm:
    """A Slurm of two nodes, which are this machine; it lives in a folder and ends with `close`."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, []
        self.environment = {**environment(), "SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir()
        # Two GPUs a node, as far as Slurm can see.
        gpus = [folder / "gpu0", folder / "gpu1"]
        for path in gpus:
            path.touch()
        (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={','.join(map(str, gpus))}\n")
        ports = [free_port() for _ in range(3)]
        configuration = CONFIGURATION.format(host=socket.gethostname(), ports=ports, folder=folder, cpus=os.cpu_count())
        (folder / "slurm.conf").write_text(configuration)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)
        own = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "--force", "--foreground", f"--socket={folder}/munge.socket", *own)
        self._wait(lambda: (folder / "munge.socket").exists(), "munged")
        self._start("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._start("slurmd", "-D", "-N", node)
        self._wait(lambda: self.run("sinfo", "-h", "-o", "%T", check=False).split() == ["idle"], "the nodes")

    def _start(self, program: str, *flags: str) -> None:
        with open(self.folder / f"{program}.{len(self.daemons)}.log", "w") as log:
            self.daemons.append(
                subprocess.Popen(
                    [program, *flags], env=self.environment, stdout=log, stderr=log, start_new_session=True
                )
            )

    def _wait(self, is_there, what: str) -> None:
        end = time.monotonic() + 60
        while not is_there():
            logs = "".join(path.read_text() for path in self.folder.glob("*.log"))
            assert time.monotonic() < end, f"{what} did not come up:\n{logs}"
            time.sleep(0.5)

    def run(self, *command: str, check: bool = True, **variables: str) -> str:
        done = subprocess.run(
            command, env=self.environment | variables, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        return dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", number).split() if "=" in word)

    def close(self) -> None:
        self.run("scancel", "--full", "--user=root", check=False)
        with suppress(AssertionError):
            self._wait(lambda: not self.run("squeue", "-h", check=False).strip(), "the end of the jobs")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    # Not pytest's: the path of a socket has at most 108 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Slurm(folder)
    yield cluster
    cluster.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def flags(folder) -> list[str]:
    model, data = build_model(folder / "model"), build_data(folder / "data", num_train=64, num_test=10)
    return ["--model_name_or_path", str(model), "--data_dir", str(data), *FLAGS]


@pytest.fixture(scope="module")
def whole(folder, flags) -> Run:
    """The run that nothing happens to, without Slurm."""
    run = torchrun(folder / "whole", *flags)
    assert run.status == 0, run.stderr
    return run


def wait_for(slurm: Slurm, number: str, log: Path, text: str = "") -> str:
    """The job's log, as soon as it holds the text, or without one, the job has ended."""
    end = time.monotonic() + PATIENCE
    while True:
        ended = slurm.job(number)["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
        said = log.read_text() if log.exists() else ""
        if ended or (text and text in said):
            assert text in said, said
            return said
        assert time.monotonic() < end, said
        time.sleep(1)


def results(run: Run) -> dict:
    """What must be equal, to the last bit."""
    after = run.evaluation("after")
    del after["seconds"]
    digest = hashlib.sha256((run.output / "model.safetensors").read_bytes()).hexdigest()
    return {"model.safetensors": digest, "losses": run.losses, "eval_after.json": after}


@pytest.mark.timeout(4 * PATIENCE)
@pytest.mark.parametrize(("nodes", "gpus"), [(1, 2), (2, 1)], ids=["one node", "two nodes"])
def test_a_job_that_its_time_limit_cuts_is_requeued_and_ends_as_if_nothing_had_happened(
    slurm, whole, flags, folder, nodes, gpus
):
    output, log = folder / f"nodes-{nodes}", folder / f"nodes-{nodes}.log"
    shape = [f"--nodes={nodes}", f"--gpus-per-node={gpus}", f"--cpus-per-task={os.cpu_count()}"]
    job = [str(ROOT / "launch" / "slurm.sbatch"), "finetune_hf_trainer_docvqa.py", *flags, "--output_dir", str(output)]
    submit = ["sbatch", "--parsable", *LIMITS, *shape, f"--output={log}", *job]
    number = slurm.run(*submit, VENV=sys.prefix).strip()
    # However fast the machine is: the limit comes near while the run trains, and is far again afterwards.
    wait_for(slurm, number, log, "step 20 of")
    slurm.run("scontrol", "update", f"JobId={number}", f"EndTime=now+{NOTICE + 30}seconds")
    wait_for(slurm, number, log, "requeued 1 times")
    slurm.run("scontrol", "update", f"JobId={number}", f"TimeLimit={LIMIT}")
    said = wait_for(slurm, number, log)
    print(said)
    job = slurm.job(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), said
    assert said.count("the time limit is near") == 1
    assert said.count("stopped by SIGTERM: checkpoint-") == 1
    assert said.count(f"going on from {output}/checkpoint-") == 1
    found = results(Run(output, 0, said, ""))
    print(json.dumps({"undisturbed": results(whole), "requeued": found}, indent=1))
    assert found == results(whole)


def test_a_run_that_fails_is_not_requeued(slurm, flags, folder):
    log = folder / "fails.log"
    job = [str(ROOT / "launch" / "slurm.sbatch"), "finetune_hf_trainer_docvqa.py", *flags, "--num_crops", "0"]
    shape = ["--gpus-per-node=1", "--cpus-per-task=1", f"--output={log}"]
    number = slurm.run("sbatch", "--parsable", "--wait", *LIMITS, *shape, *job, check=False, VENV=sys.prefix).strip()
    assert slurm.job(number)["JobState"] == "FAILED"
    assert slurm.job(number)["Restarts"] == "0"
    assert "error: --num_crops" in log.read_text()
