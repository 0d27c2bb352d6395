"""The launch files before the programs that read them: SkyPilot, Azure's SDK, Kubernetes' schemas, a linter of Dockerfiles.

`make test-launch`, in an environment of its own. Each must refuse a fault too: a field that is spelled wrong.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sky = pytest.importorskip("sky")
pytest.importorskip("azure.ai.ml")

import kubernetes_validate  # noqa: E402
import yaml  # noqa: E402
from azure.ai.ml import load_job  # noqa: E402
from azure.ai.ml.exceptions import ValidationException  # noqa: E402
from kubeflow.training.api_client import ApiClient  # noqa: E402
from marshmallow.exceptions import ValidationError  # noqa: E402

LAUNCH = Path(__file__).parents[2] / "launch"


def faulty(name: str, right: str, wrong: str, folder: Path) -> Path:
    """A launch file with a fault, in another folder."""
    text = (LAUNCH / name).read_text()
    assert right in text
    path = folder / name
    path.write_text(text.replace(right, wrong))
    return path


def test_skypilot_reads_its_file():
    task = sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
    assert {next(iter(choice.accelerators)) for choice in task.resources} == {"A100-80GB", "H100"}
    assert all(choice.use_spot for choice in task.resources)
    assert task.storage_mounts["/output"].name == "YOUR-BUCKET"


def test_skypilot_refuses_a_fault(tmp_path):
    with pytest.raises(ValueError, match="job_recover"):
        sky.Task.from_yaml(str(faulty("skypilot.yaml", "job_recovery:", "job_recover:", tmp_path)))


def test_azure_reads_its_file():
    job = load_job(LAUNCH / "azureml.yaml")
    checked = job._validate()
    assert checked.passed, checked.error_messages
    assert (job.distribution.type, job.outputs["run"].mode) == ("pytorch", "rw_mount")


def test_azure_refuses_a_fault(tmp_path):
    path = faulty("azureml.yaml", "process_count_per_instance", "processes_per_instance", tmp_path)
    with pytest.raises((ValidationError, ValidationException)):
        load_job(path)


def read_job(path: Path) -> dict:
    """The PyTorchJob as the operator's own classes hold it: what they do not know is gone."""
    job = SimpleNamespace(data=json.dumps(yaml.safe_load(path.read_text())))
    client = ApiClient()
    return client.sanitize_for_serialization(client.deserialize(job, "KubeflowOrgV1PyTorchJob"))


def check_pod(path: Path) -> None:
    template = yaml.safe_load(path.read_text())["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_the_operator_reads_the_kubernetes_file():
    path = LAUNCH / "kubernetes.yaml"
    assert read_job(path) == yaml.safe_load(path.read_text())


def test_the_operator_does_not_know_a_fault(tmp_path):
    path = faulty("kubernetes.yaml", "maxRestarts", "maxRestart", tmp_path)
    assert read_job(path) != yaml.safe_load(path.read_text())


def test_kubernetes_reads_the_pod():
    check_pod(LAUNCH / "kubernetes.yaml")


def test_kubernetes_refuses_a_fault(tmp_path):
    with pytest.raises(kubernetes_validate.ValidationError):
        check_pod(faulty("kubernetes.yaml", "terminationGracePeriodSeconds", "terminationGracePeriod", tmp_path))


def hadolint(path: Path) -> subprocess.CompletedProcess:
    return subprocess.run([Path(sys.executable).with_name("hadolint"), path], capture_output=True, text=True)


def test_the_linter_finds_nothing_in_the_dockerfile():
    done = hadolint(LAUNCH / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_the_linter_finds_a_fault(tmp_path):
    assert hadolint(faulty("Dockerfile", "COPY . /phi3v", "ADD . phi3v", tmp_path)).returncode == 1
