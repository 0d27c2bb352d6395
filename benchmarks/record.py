"""Result files: the figures, and what they were measured with."""

import datetime
import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def provenance(*libraries: str) -> dict[str, Any]:
    """Date, commit, machine, and the versions of Python and of `libraries`."""
    # Results aside: a command that writes several would find its own.
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "date": datetime.date.today().isoformat(),
        "commit": (_git("rev-parse", "HEAD") or "unknown") + (" with changes" if status else ""),
        "machine": f"{cpu}, {len(os.sched_getaffinity(0))} cores, {platform.system()}",
        "versions": {"python": platform.python_version()} | {library: version(library) for library in libraries},
    }


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result file, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
