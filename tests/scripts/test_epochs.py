"""An epoch trains every row exactly once, on any number of processes, and trains the same on all of them."""

import json
import math
import sys
from functools import cache
from pathlib import Path

import pytest
import recipe
from launch import finish, free_port

ROWS = (1, 15, 16, 17, 18, 33)
ENGINES = {"DDP": ["--deepspeed", "none"], "ZeRO-2": []}
WORKER = str(Path(__file__).parent / "epochs.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("epochs")
    recipe.model_folder(folder / "model")
    recipe.docvqa_rows(folder / "data", max(ROWS), 2)
    return folder


def train(folder: Path, processes: int, rows, batches, *flags: str) -> dict[tuple[int, int], dict]:
    """(rows, batch size) -> what an epoch of it was."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [f"--master_port={free_port()}", WORKER, str(folder)]
    command += [",".join(map(str, rows)), ",".join(map(str, batches)), *flags]
    done = finish(command, folder)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    return {(result["rows"], result["batch"]): result for result in results}


@pytest.fixture(scope="module")
def on_one_process(folder):
    """`on_one_process("DDP")`: an epoch of 1 and one of 17 rows."""
    return cache(lambda engine: train(folder, 1, [1, 17], [16], *ENGINES[engine]))


def check(found: dict, alone: dict) -> None:
    for (rows, batch), result in found.items():
        print(
            f"{rows:3} rows, batch {batch:2}, {result['processes']} process(es): {result['samples']:3} samples, ",
            end="",
        )
        print(f"{result['steps']:2} steps, last loss {result['losses'][-1]:.6f}")
        assert result["samples"] == rows
        assert result["steps"] == math.ceil(rows / batch)
        assert result["losses"] == pytest.approx(alone[rows, batch]["losses"], abs=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_epoch_is_the_same_on_one_and_on_three_processes(folder, on_one_process, engine):
    # 17 rows: the last step has one sample, two of three ranks have none; 16 does not divide by 3.
    alone = on_one_process(engine)
    check(alone, alone)
    check(train(folder, 3, [1, 17], [16], *ENGINES[engine]), alone)


def test_engines_and_micro_batches_agree(folder, on_one_process):
    alone = on_one_process("DDP")
    check(train(folder, 2, [17], [16], "--batch_size_per_gpu", "3"), alone)
    check(train(folder, 2, [17], [16], "--batch_size_per_gpu", "3", "--padding_free"), alone)


@pytest.mark.slow
def test_every_row_is_trained_once_whatever_the_numbers(folder):
    alone = train(folder, 1, ROWS, [1, 16], *ENGINES["DDP"])
    check(alone, alone)
    for processes in (2, 3):
        check(train(folder, processes, ROWS, [1, 16], *ENGINES["DDP"]), alone)
