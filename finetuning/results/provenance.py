"""What a run was made with: its command, the commit, the machine and the versions of the libraries."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "bitsandbytes", "datasets")
SECRETS = ("--hub_token",)


def commit(untracked: str = "no") -> str:
    """The commit of this checkout, with a word if files were changed since; empty where there is no checkout.

    Args:
        untracked (str): whether files count that git does not know: git's own --untracked-files, "no" or "normal".
    """
    # Results aside: a command that writes several would find its own.
    changed = _git("status", "--porcelain", f"--untracked-files={untracked}", "--", ".", ":!benchmarks/results")
    found = _git("rev-parse", "HEAD") if (ROOT / ".git").exists() else ""
    return found and found + (" with changes" if changed else "")


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()


def machine() -> str:
    """The processor, the cores that this process may use, and the system."""
    cpu = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, {platform.system()}"


def versions(libraries: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Versions of Python and of those of `libraries` that are installed."""
    found = {"python": platform.python_version()}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def command() -> list[str]:
    """The words of the command that does this run again; secrets are left out."""
    script, words = os.path.relpath(sys.argv[0]), []
    given = iter(sys.argv[1:])
    for word in given:
        if word in SECRETS:
            next(given, None)
        elif word.split("=")[0] not in SECRETS:
            words.append(word)
    launcher = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        launcher = ["torchrun", f"--nproc_per_node={local}", *([f"--nnodes={world // local}"] if world > local else [])]
    return [*launcher, script, *words]
