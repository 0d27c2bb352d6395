"""Result files: the figures, and what they were measured with."""

import datetime
import json
from pathlib import Path
from typing import Any

from finetuning.results.provenance import commit, machine, versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def provenance(*libraries: str) -> dict[str, Any]:
    """Date, commit, machine, and the versions of Python and of `libraries`."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(untracked="normal") or "unknown",
        "machine": machine(),
        "versions": versions(libraries),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result file, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
