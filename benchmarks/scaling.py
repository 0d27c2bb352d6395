"""How a training step scales: measured on one and two processes, and a model of ZeRO-2's communication on more GPUs.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --rounds 1 --steps 3

Measured is weak scaling on a CPU: the recipes' own trainer under torchrun, full fine-tuning with ds_configs/zero2.json and LoRA
with DistributedDataParallel, each process with one thread on a core of its own and as many images, prepared beforehand; float32,
gloo. One and two processes run in turns. Nothing is hidden there: a process communicates on the core that it computes on.
Units: seconds an optimizer step, the median over the steps of all rounds after their warm-ups; cpu_seconds, those that the first
process had its core (the rest it waited: for the other process, or for a core that other programs use); efficiency is images
a second of two processes over twice those of one; collectives, the bytes that DeepSpeed hands over in an optimizer step.

The model, by the source of deepspeed 0.19.8 (runtime/zero/stage_1_and_2.py), for P trained parameters on N GPUs:

- The backward pass of every micro-batch reduces gradients (process_gradients -> reduce_ready_partitions_and_remove_grads, where
  partition_gradients alone suffices; the Trainer gives DeepSpeed no no_sync).
- It all-reduces buckets, whatever reduce_scatter says (average_tensor -> allreduce_and_scatter -> allreduce_bucket), because
  use_multi_rank_bucket_allreduce is on by default; in bf16 or fp16 (communication_data_type). A rank sends 2 x 2P (N - 1) / N
  bytes a micro-batch, twice what a reduce-scatter would.
- With overlap_comm a bucket is reduced while the gradients of the next are computed (average_tensor, on reduction_stream); for the
  last one the backward pass waits (independent_gradient_partition_epilogue): it is never hidden.
- step() ends with all_gather_dp_groups, and waits: 2P (N - 1) / N bytes an optimizer step, hidden behind nothing.
- LoRA goes by DDP, not DeepSpeed: fp32 gradients of the adapters, 2 x 4P (N - 1) / N bytes an optimizer step, in buckets of
  25 MiB behind the backward pass of its last micro-batch.

Seconds are bytes over the bandwidth of a ring. It enters and leaves a node once, so that is what all network cards of a node carry
together one way, and NVLink's in a node. Source: https://github.com/NVIDIA/nccl/issues/412 (8 GPUs and one card of 25 GB/s a node:
24 GB/s). Assumed, not measured: line rates; an H100 at 55% of 798 TFLOP/s; a backward pass as long as its share of the model FLOPs
(2/3 of full fine-tuning; recomputation makes it 3/4), which gives gradients evenly. Left out: latency, optimizer, slow ranks.
The published speeds of 16 and 32 A100 are within 2% of the model's; those of V100 fall behind it, at 32 by a third, which no
bandwidth explains: one low enough would slow 16 more.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from finetuning.arguments import ZERO2, parse_args
from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.encoding import encode_conversation
from finetuning.errors import run_script
from finetuning.training.loading import load_model, load_processor
from finetuning.training.trainer import RecipeTrainer

from .models import STRATEGIES, build_folder, config, sample
from .record import RESULTS, ROOT, provenance, write
from .train_step import step_flops

# Model: images of a micro-batch, most crops of each. The medium one takes 10 to 20 seconds an image.
SIZES = {"tiny": (4, 16), "medium": (1, 1)}
MEASURED = ("full", "lora")
WARMUP = 2  # optimizer steps
ACCUMULATION = 2  # micro-batches an optimizer step
UNITS = {"seconds": "s a step", "cpu_seconds": "s of them on its core", "img_per_s": "images / s"}

GPUS = (8, 16, 32, 64)
BATCH = 64  # effective batch of the published runs, in micro-batches of 1
PEAK, SHARE = 798e12, 0.55  # FLOP/s of a large matrix product on an H100, and how much of it a step gets
# Parameters of the official model, as the recipes print them; LoRA with rank 64.
TRAINED = {"full": 4_134_023_168, "frozen": 3_821_079_552, "lora": 130_895_872}
PAGE = ([2443], 17, 10)  # a DocVQA page: tokens, crops, labels
BUCKET = json.loads(ZERO2.read_text())["zero_optimization"]["reduce_bucket_size"]  # gradients
DDP_BUCKET = 25 * 2**20 // 4
# GB/s one way, of a node with 8 GPUs: a GPU's share in Gb/s is the same number.
NVLINK = 450
NETWORKS = {"8 x 400 Gb/s": 400, "8 x 200 Gb/s": 200, "100 Gb/s": 12.5, "25 Gb/s": 3.125}
# Full fine-tuning as published: GB/s of NVLink and of the network by the machines' data sheets, images a second by GPUs.
PUBLISHED = {
    "A100, 8 x 200 Gb/s": (300, 200, {8: 8.657, 16: 16.903, 32: 33.433}),
    "V100, 100 Gb/s": (150, 12.5, {8: 2.462, 16: 4.182, 32: 5.465}),
}


class Watch(TrainerCallback):
    """When each optimizer step ends, and the bytes that DeepSpeed hands to each collective after the warm-up."""

    def __init__(self):
        # Not before the arguments have said which accelerator it is for.
        from deepspeed import comm

        self.ends, self.bytes = [], {}
        for name in ("all_reduce", "reduce", "all_gather_into_tensor"):
            setattr(comm, name, self._counted(name, getattr(comm, name)))

    def _counted(self, name: str, collective):
        def call(tensor: torch.Tensor, *args, **kwargs):
            self.bytes[name] = self.bytes.get(name, 0) + tensor.nbytes
            return collective(tensor, *args, **kwargs)

        return call

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append((time.perf_counter(), time.process_time()))
        if state.global_step == WARMUP:
            self.bytes.clear()


def train(strategy: str, folder: Path, model: str, steps: int) -> None:
    """Trains as one of torchrun's processes; the first one writes child.json to `folder`."""
    rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    micro, crops = SIZES[model]
    images = ranks * micro * ACCUMULATION
    flags = [
        "--model_name_or_path",
        str(folder),
        "--output_dir",
        str(folder.with_name(f"{folder.name}-output")),
        "--use_cpu",
        "--no-tqdm",
    ]
    flags += ["--batch_size", str(images), "--batch_size_per_gpu", str(micro), "--max_steps", str(WARMUP + steps)]
    flags += ["--num_crops", str(crops), "--dataloader_num_workers", "0", "--save_strategy", "no"]
    args = parse_args([*flags, "--logging_steps", "1000", "--logging_first_step", "False", *STRATEGIES[strategy]])
    processor, trained, watch = load_processor(args), load_model(args), Watch()
    RecipeTrainer(
        model=trained,
        args=args,
        train_dataset=Pages(encode_conversation(sample("page", number), processor) for number in range(images)),
        data_collator=DataCollatorForPhi3V(processor.tokenizer.pad_token_id),
        processing_class=processor,
        callbacks=[watch],
    ).train()
    if rank == 0:
        seconds, cpu_seconds = torch.tensor(watch.ends[WARMUP - 1 :], dtype=torch.float64).diff(dim=0).T.tolist()
        result = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "trained_parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad),
            "collectives": {name: size // steps for name, size in watch.bytes.items()},
        }
        write(folder / "child.json", result)


class Pages(list):
    """Encoded pages of one length, as the data set of a `RecipeTrainer`."""

    mixture, sources = None, ()

    @property
    def epoch_size(self) -> int:
        return len(self)

    @property
    def lengths(self) -> list[int]:
        return [len(page["input_ids"]) for page in self]

    def start_epoch(self, epoch: int) -> None:
        """Every epoch is the same."""


def launch(strategy: str, processes: int, folder: Path, model: str, steps: int) -> dict[str, Any]:
    """Runs `train` on this many processes; returns what it saw."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "benchmarks.scaling", "--train", strategy, str(folder), "--model", model, "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if found.returncode:
        sys.stderr.write(found.stderr)
    found.check_returncode()
    return json.loads((folder / "child.json").read_text())


def summary(runs: dict[int, list[dict[str, Any]]], images: int) -> dict[str, Any]:
    """Medians of the runs by their number of processes, each with this many images a step, and the efficiency."""
    result = {}
    for processes, found in runs.items():
        seconds, cpu_seconds = (
            statistics.median(step for one in found for step in one[name]) for name in ("seconds", "cpu_seconds")
        )
        result[str(processes)] = {
            "seconds": round(seconds, 4),
            "cpu_seconds": round(cpu_seconds, 4),
            "img_per_s": round(processes * images / seconds, 4),
            "rounds": [round(statistics.median(one["seconds"]), 4) for one in found],
            "trained_parameters": found[0]["trained_parameters"],
            "collectives": found[0]["collectives"],
        }
    result["efficiency"] = round(result["2"]["img_per_s"] / (2 * result["1"]["img_per_s"]), 3)
    return result


class Work(NamedTuple):
    """What a GPU has to do in a micro-batch."""

    strategy: str
    trained_parameters: int
    seconds: float
    backward: float  # share of the seconds


def work(strategy: str) -> Work:
    """A page on the official model, at the assumed speed."""
    flops = step_flops(config("full"), *PAGE, strategy)
    return Work(strategy, TRAINED[strategy], flops["step"] / (PEAK * SHARE), 1 - flops["forward"] / flops["step"])


def sent(work: Work, gpus: int) -> dict[str, float]:
    """Bytes that a rank sends: `reduce` in a backward pass that reduces, `gather` in an optimizer step."""
    ring = work.trained_parameters * (gpus - 1) / gpus
    return {"reduce": 8 * ring, "gather": 0} if work.strategy == "lora" else {"reduce": 4 * ring, "gather": 2 * ring}


def predict(work: Work, gpus: int, bandwidth: float, micro_batches: int) -> dict[str, float]:
    """Seconds of an optimizer step, of its communication, and of what of that is not hidden.

    Args:
        work (Work): a micro-batch.
        gpus (int): ranks.
        bandwidth (float): of the ring, GB/s.
        micro_batches (int): of a rank in an optimizer step.
    """
    lora = work.strategy == "lora"
    reduce, gather = (size / bandwidth / 1e9 for size in sent(work, gpus).values())
    buckets = math.ceil(work.trained_parameters / (DDP_BUCKET if lora else BUCKET))
    # The slower of the two sets the pace from bucket to bucket; beside the last one nothing is computed.
    late = reduce / buckets + (1 - 1 / buckets) * max(0, reduce - work.backward * work.seconds)
    reductions = 1 if lora else micro_batches
    found = {"communication": reductions * reduce + gather, "not_hidden": reductions * late + gather}
    found["seconds"] = micro_batches * work.seconds + found["not_hidden"]
    return {name: round(seconds, 5) for name, seconds in found.items()}


def table(strategy: str) -> dict[str, Any]:
    """Predictions for the official model by interconnect and GPUs; eight are one node."""
    page, steps = work(strategy), {}
    # A GB/s of 8 GPUs is a Gb/s of each.
    needed = sent(page, GPUS[-1])["reduce"] / (page.backward * page.seconds) / 1e9
    print(
        f"\n{strategy}: {page.trained_parameters:,} trained, {page.seconds:.3f} s a page, {page.backward:.0%} backward"
    )
    print(f"hidden but for its last bucket from {needed:.1f} GB/s a node, which are {needed:.1f} Gb/s a GPU")
    for name, bandwidth in ({"NVLink": NVLINK} | NETWORKS).items():
        gpus = GPUS[1:] if name in NETWORKS else GPUS[:1]
        steps[name] = {count: predict(page, count, bandwidth, BATCH // count) for count in gpus}
        cells = (
            f"{n} GPUs {s['communication']:7.3f} {s['not_hidden'] / s['seconds']:4.0%}" for n, s in steps[name].items()
        )
        print(f"  {name:14}" + "   ".join(cells))
    return page._asdict() | {"hidden_from_gb_per_s_a_node": round(needed, 1), "steps": steps}


def plausible() -> dict[str, Any]:
    """Images a second on more nodes, predicted from the published speed of one, beside the published ones."""
    found = {}
    for name, (nvlink, network, published) in PUBLISHED.items():
        # What eight GPUs took, less what they waited.
        page, passed = work("full"), BATCH / published[8]
        waited = predict(page._replace(seconds=passed / 8), 8, nvlink, 8)["not_hidden"]
        page = page._replace(seconds=(passed - waited) / 8)
        seconds = {gpus: predict(page, gpus, network, BATCH // gpus)["seconds"] for gpus in (16, 32)}
        found[name] = {n: {"predicted": round(BATCH / s, 3), "published": published[n]} for n, s in seconds.items()}
        cells = (f"{n} GPUs {case['predicted']} ({case['published']})" for n, case in found[name].items())
        print(f"  {name}: 8 GPUs ({published[8]})   " + "   ".join(cells))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", choices=SIZES, default="tiny", help="size of the model that is measured (tiny)")
    options.add_argument("--rounds", type=int, default=3, help="runs of each number of processes (3)")
    options.add_argument("--steps", type=int, default=6, help="steps measured in a run (6)")
    options.add_argument("--result", type=Path, default=RESULTS / "scaling.json", help="file to write")
    options.add_argument("--train", nargs=2, metavar=("STRATEGY", "FOLDER"), help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.train:
        train(args.train[0], Path(args.train[1]), args.model, args.steps)
        return
    result = provenance("torch", "transformers", "accelerate", "deepspeed", "peft")
    result |= {"given": {"model": args.model, "rounds": args.rounds, "steps": args.steps, "warmup": WARMUP}}
    runs = {strategy: {1: [], 2: []} for strategy in MEASURED}
    with tempfile.TemporaryDirectory() as temporary:
        folder = build_folder(args.model, Path(temporary), torch.float32)
        for _ in range(args.rounds):
            for strategy, found in runs.items():
                for processes, results in found.items():
                    results.append(launch(strategy, processes, folder, args.model, args.steps))
    images = SIZES[args.model][0] * ACCUMULATION
    result["measured"] = {strategy: summary(found, images) for strategy, found in runs.items()}
    for strategy, case in result["measured"].items():
        for processes in "12":
            figures = (f"{case[processes][name]:7.3f} {unit}" for name, unit in UNITS.items())
            print(f"{strategy:5} processes {processes}: {', '.join(figures)}")
        print(f"{strategy:5} efficiency   {case['efficiency']}")
    result["assumed"] = {"flop_per_s": PEAK, "share": SHARE, "page": PAGE, "batch": BATCH, "gb_per_s_a_node": NETWORKS}
    print(
        f"\nmodel, {BATCH} pages a step, micro-batch 1: seconds of communication, share of the step that waits for it"
    )
    result["model"] = {strategy: table(strategy) for strategy in TRAINED}
    print("\nmodel, images a second of full fine-tuning (published)")
    result["plausible"] = plausible()
    write(args.result, result)
    print(f"{result['machine']} -> {args.result}")


if __name__ == "__main__":
    run_script(main)
