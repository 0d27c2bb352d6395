"""What stands in the launch files agrees with the repository and with itself: scripts, flags, pins, GPUs, times."""

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from torch.distributed.run import get_args_parser

from finetuning.arguments import RecipeArguments, _Parser

ROOT = Path(__file__).parents[2]
FILES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "launch").iterdir())}
SLURM, DOCKER = FILES["slurm.sbatch"], FILES["Dockerfile"]
SKY, AZURE, KUBERNETES = (yaml.safe_load(FILES[name]) for name in ("skypilot.yaml", "azureml.yaml", "kubernetes.yaml"))
(CONTAINER,) = KUBERNETES["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]


def flags_of(parser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


RECIPE, TORCHRUN = flags_of(_Parser(RecipeArguments)), flags_of(get_args_parser())


def commands(text: str, start: str) -> list[list[str]]:
    """The words of each command from a word on, those in comments too; lines that belong together are joined."""
    text = re.sub(r"\s+# .*", "", re.sub(r"\n# +", "\n", text))
    text = re.sub(r"\\\n\s*|\n\s+(?=--)|\n\s+- ", " ", text)
    return [re.split(r'[\s"]+', found) for found in re.findall(rf"{start}.*", text)]


@pytest.mark.parametrize("name", FILES)
def test_scripts_and_flags_exist(name):
    found = commands(FILES[name], r"finetune_hf_trainer_\w+\.py")
    assert found
    for script, *words in found:
        assert (ROOT / script).exists()
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        assert given
        assert given <= RECIPE


@pytest.mark.parametrize("name", ["slurm.sbatch", "kubernetes.yaml", "skypilot.yaml", "Dockerfile"])
def test_torchrun_knows_its_flags(name):
    found = [words for words in commands(FILES[name], r"torchrun[\s\"]") if any(word[:2] == "--" for word in words)]
    assert found
    for words in found:
        own = next(n for n, word in enumerate(words) if word in ("$@", "$COMMAND") or word.startswith("finetune_hf"))
        assert {word.split("=")[0] for word in words[1:own] if word.startswith("--")} <= TORCHRUN


@pytest.mark.parametrize("name", FILES)
def test_pins_are_those_of_the_requirements(name):
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
    makefile = (ROOT / "Makefile").read_text()
    for package, version in re.findall(r"([\w-]+)(?:\[\w+\])?==([\w.]+\w)", FILES[name]):
        assert pins.get(package) == version or f"{package}=={version}" in makefile


def test_python_is_one_that_the_package_takes():
    (asked,) = re.findall(r'^requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    versions = re.findall(r"ARG BASE=python:(\d+\.\d+\.\d+)", DOCKER) + re.findall(r"--python (\d\.\d+)", SKY["setup"])
    assert len(versions) == 2
    assert all(version in SpecifierSet(asked) for version in versions)


# ---- Slurm


def test_slurm_reads_every_option():
    lines = SLURM.splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(options) >= 9
    assert max(options) < first_command


def test_bash_reads_the_sbatch_file():
    subprocess.run(["bash", "-n", ROOT / "launch" / "slurm.sbatch"], check=True)


def test_a_rank_is_killed_before_the_time_limit():
    notice, timeout = (
        re.search(r"--signal=B:USR1@(\d+)", SLURM)[1],
        re.search(r"^SHUTDOWN_TIMEOUT=(\d+)", SLURM, re.M)[1],
    )
    assert int(timeout) < int(notice)


# ---- Kubernetes


def test_a_rank_is_killed_before_its_pod():
    pod = KUBERNETES["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (timeout,) = [word.split("=")[1] for word in CONTAINER["command"] if word.startswith("--shutdown-timeout")]
    assert int(timeout) < pod["terminationGracePeriodSeconds"]
    assert pod["securityContext"]["runAsUser"] == int(re.search(r"ARG UID=(\d+)", DOCKER)[1])


def test_the_numbers_of_the_kubernetes_file_agree():
    spec = KUBERNETES["spec"]
    elastic, workers = spec["elasticPolicy"], spec["pytorchReplicaSpecs"]["Worker"]
    assert elastic["minReplicas"] == elastic["maxReplicas"] == workers["replicas"]
    # tests/scripts/test_several_nodes.py
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in CONTAINER["env"]
    assert spec["nprocPerNode"] == CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    volumes = {volume["name"]: volume for volume in workers["template"]["spec"]["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in CONTAINER["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert "/output" in mounts


# ---- SkyPilot, Azure


def test_skypilot_writes_into_the_bucket():
    assert "--output_dir /output/$RUN" in SKY["run"]
    assert SKY["file_mounts"]["/output"]["mode"] == "MOUNT_CACHED"
    assert SKY["num_nodes"] == 1


def test_the_numbers_of_the_azure_file_agree():
    ranks = AZURE["distribution"]["process_count_per_instance"]
    assert AZURE["environment_variables"]["LOCAL_WORLD_SIZE"] == str(ranks)
    assert "--output_dir ${{outputs.run}}" in AZURE["command"]
    code = (ROOT / "launch" / AZURE["code"]).resolve()
    build = AZURE["environment"]["build"]
    assert (code, (ROOT / "launch" / build["path"]).resolve()) == (ROOT, ROOT)
    assert (ROOT / build["dockerfile_path"]).exists()


# ---- Docker


def test_the_image_holds_what_a_run_needs():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    needed = ["requirements.txt", "requirements-gpu.txt", *(path.name for path in ROOT.glob("*.py"))]
    needed += [path.relative_to(ROOT).as_posix() for path in (ROOT / "ds_configs").iterdir()]
    needed += ["finetuning/results/templates/x.html", "phi3v/__init__.py", "finetuning/data/dataset.py"]
    for path in needed:
        parts = [*Path(path).parents, Path(path)]
        assert not any(fnmatch(part.as_posix(), pattern) for part in parts for pattern in ignored), path
    assert set(re.findall(r"requirements[\w-]*\.txt", DOCKER)) <= {path.name for path in ROOT.glob("requirements*.txt")}


def test_the_image_is_not_roots():
    assert re.findall(r"^USER (.*)$", DOCKER, re.MULTILINE) == ["${UID}"]
