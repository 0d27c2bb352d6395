"""What all tests share: two threads, and the table of deviations from the official code."""

import os
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

from benchmarks.record import provenance, write

# As many as the golden numbers were recorded with; more would only make the tests slower on a shared machine.
torch.set_num_threads(2)

settings.register_profile(
    "short", max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.register_profile("long", max_examples=2_000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("short")


# Lengths that a test has counted are kept for no later one, nor for the user's own runs.
_assets = tempfile.TemporaryDirectory(prefix="phi3v-assets-")
os.environ["HF_ASSETS_CACHE"] = _assets.name


def pytest_addoption(parser):
    parser.addoption("--parity-results", help="json file to write the largest deviations to (needs tests/parity)")
    parser.addoption(
        "--bad-inputs", help="json file to write the line that each bad input gets to (needs tests/scripts)"
    )
    parser.addoption("--mixed-rows", help="json file to write the losses of mixed rows to (slow, needs tests/scripts)")
    parser.addoption("--own-inputs", help="json file to write the scores of each form of data to (needs tests/scripts)")


def pytest_terminal_summary(terminalreporter, config):
    """Prints the largest deviation of each quantity that the parity tests recorded, with `-q` too."""
    quantities = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", None) == "call":
            name = report.nodeid.split("::")[-1].removesuffix("]").split("[")[-1]
            for key, deviation in report.user_properties:
                if key == "deviation":
                    quantities.setdefault(deviation["quantity"], []).append({**deviation, "test": name})
    if not quantities:
        return
    terminalreporter.section("parity with the official code: largest deviations", sep="-")
    terminalreporter.line(f"{'quantity':32} {'values':>8}  {'largest':>8}  {'bound':>8}  in")
    worst = {}
    for quantity, deviations in sorted(quantities.items()):
        values = sum(deviation["values"] for deviation in deviations)
        worst[quantity] = {**max(deviations, key=lambda deviation: deviation["largest"]), "values": values}
        figures = f"{values:8}  {worst[quantity]['largest']:8.1e}  {worst[quantity]['bound']:8.1e}"
        terminalreporter.line(f"{quantity:32} {figures}  {worst[quantity]['test']}")
    if path := config.getoption("--parity-results"):
        write(Path(path), provenance("torch", "transformers") | {"deviations": worst})
