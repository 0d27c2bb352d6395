"""Several nodes: two agents of torchrun on the loopback, their ranks, the loss of one, and going on without it."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import recipe
import torch
from launch import Run, environment, free_port, script, torchrun
from safetensors.torch import load_file

STRATEGIES = {"LoRA on DDP": ["--use_lora", "--lora_rank", "4", "--lora_dropout", "0.1"], "full on ZeRO-2": []}
PATIENCE = 600  # seconds
pytestmark = pytest.mark.timeout(3 * PATIENCE)
# Without it a node that comes later is never told where the first rank is (torch 2.13).
ENVIRONMENT = {**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
FLAGS = [
    *("--batch_size", "4", "--num_crops", "2", "--num_train_epochs", "2", "--learning_rate", "1e-3", "--no-tqdm"),
    *("--warmup_steps", "0", "--logging_steps", "1", "--save_steps", "2", "--max_new_tokens", "4"),
    *("--dataloader_num_workers", "0"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def flags(folder) -> list[str]:
    model, data = recipe.model_folder(folder / "model"), recipe.docvqa_rows(folder / "data", 10, 5)
    return ["--model_name_or_path", str(model), "--data_dir", str(data), *FLAGS]


@pytest.fixture(scope="module")
def one_node(folder, flags):
    """`one_node(strategy)`: the run of two processes of one agent, made when it is first asked for."""
    runs = {}

    def run(strategy: str) -> Run:
        if strategy not in runs:
            runs[strategy] = torchrun(folder / f"one-{strategy.split()[0]}", *flags, *STRATEGIES[strategy])
            assert runs[strategy].status == 0, runs[strategy].stderr
        return runs[strategy]

    return run


@dataclass
class Agent:
    """torchrun on a node of one process, which are all on this machine."""

    process: subprocess.Popen
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def lose(self) -> None:
        """What is left of a node that has lost its power: nothing."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path) -> Iterator:
    """`start(output, options, flags)`: an agent; those that still run are ended after the test."""
    agents: list[Agent] = []

    def begin(output: Path, options: list[str], flags: list[str]) -> Agent:
        log = tmp_path / f"agent-{len(agents)}.log"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", *options]
        command = [*launcher, script("docvqa"), "--output_dir", str(output), *flags]
        with open(log, "w") as file:
            process = subprocess.Popen(command, env=ENVIRONMENT, cwd=output.parent, stdout=file, stderr=file)
        agents.append(Agent(process, log))
        return agents[-1]

    yield begin
    for agent in agents:
        if agent.process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                agent.lose()


def elastic(nodes: str, port: int, first: bool) -> list[str]:
    """Options of an agent that meets the others by c10d, and begins again when one is lost; the first one lets them meet."""
    # By its name every node here would be that of the endpoint.
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", f"--rdzv_conf=is_host={int(first)}"]
    return [f"--nnodes={nodes}", *meeting, "--max_restarts=3"]


def wait_for(path: Path, agent: Agent) -> None:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        assert agent.process.poll() is None, agent.said()
        assert time.monotonic() < end, agent.said()
        time.sleep(0.05)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor for path in run.output.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(found: Run, expected: Run) -> None:
    """The same losses, answers and weights, to the last bit."""
    assert found.losses == expected.losses
    assert {**found.evaluation("after"), "seconds": 0} == {**expected.evaluation("after"), "seconds": 0}
    then, now = weights(expected), weights(found)
    assert then.keys() == now.keys()
    assert all(torch.equal(tensor, now[name]) for name, tensor in then.items())


@pytest.mark.parametrize("strategy", ["full on ZeRO-2", pytest.param("LoRA on DDP", marks=pytest.mark.slow)])
def test_two_nodes_train_what_one_does(start, one_node, folder, flags, strategy):
    output, port = folder / f"two-{strategy.split()[0]}", free_port()
    options = ["--nnodes=2", "--master_addr=localhost", f"--master_port={port}"]
    agents = [start(output, [*options, f"--node_rank={rank}"], [*flags, *STRATEGIES[strategy]]) for rank in (0, 1)]
    for agent in agents:
        assert agent.process.wait(PATIENCE) == 0, agent.said()
    assert "effective batch  4 = 2 rank(s) x 1 micro-batch x 2 accumulation" in agents[0].said()
    # The second node's ranks say nothing.
    assert "effective batch" not in agents[1].said()
    assert_same(Run(output, 0, "", ""), one_node(strategy))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_node_that_is_lost_and_replaced_costs_the_steps_since_the_last_checkpoint(
    start, one_node, folder, flags, strategy
):
    output, port, given = folder / f"replaced-{strategy.split()[0]}", free_port(), [*flags, *STRATEGIES[strategy]]
    first, second = (start(output, elastic("2", port, is_first), given) for is_first in (True, False))
    wait_for(output / "checkpoint-2" / "manifest.json", first)
    second.lose()
    replaced = start(output, elastic("2", port, False), given)
    for agent in (first, replaced):
        assert agent.process.wait(PATIENCE) == 0, first.said() + agent.said()
    assert f"going on from {output}/checkpoint-" in first.said() + replaced.said()
    assert_same(Run(output, 0, "", ""), one_node(strategy))


def lose_one_for_good(start, output: Path, flags: list[str]) -> Agent:
    """Starts two nodes, of which one would do, loses the second after a checkpoint, and waits for the end of the first."""
    port = free_port()
    first, second = (start(output, elastic("1:2", port, is_first), flags) for is_first in (True, False))
    wait_for(output / "checkpoint-2" / "manifest.json", first)
    second.lose()
    first.process.wait(PATIENCE)
    return first


@pytest.mark.slow
def test_ddp_goes_on_with_the_nodes_that_are_left(start, one_node, folder, flags):
    whole, output = one_node("LoRA on DDP"), folder / "left-LoRA"
    agent = lose_one_for_good(start, output, [*flags, *STRATEGIES["LoRA on DDP"]])
    said = agent.said()
    assert agent.process.returncode == 0, said
    assert f"going on from {output}/checkpoint-" in said
    assert "changed: processes 1 instead of 2" in said
    # Each step sees the samples that it would have seen.
    assert "effective batch  4 = 1 rank(s) x 1 micro-batch x 4 accumulation" in said
    losses = Run(output, 0, "", "").losses
    assert losses[:2] == whole.losses[:2]
    assert len(losses) == len(whole.losses)
    # Dropout has other random numbers on another rank.
    assert losses == pytest.approx(whole.losses, rel=0.1)


@pytest.mark.slow
def test_zero2_needs_as_many_nodes_as_before_and_says_so(start, folder, flags):
    agent = lose_one_for_good(start, folder / "left-full", flags)
    assert agent.process.returncode == 1
    assert (
        "expected 2 processes, since DeepSpeed keeps a share of the optimizer's states for each, found 1"
        in agent.said()
    )
    assert not (folder / "left-full" / "manifest.json").exists()
