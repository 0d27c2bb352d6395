"""What a process needs before it starts: ranks, open files, shared memory, and its part in a restarted group of processes."""

import os
import resource
import shutil
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

from .errors import InputError

MAX_IMAGE_PIXELS = 180_000_000
# A variable of the environment reaches the workers of a DataLoader however they are started, forked or spawned.
PIXEL_LIMIT = "PHI3V_MAX_IMAGE_PIXELS"
OPEN_FILES, FEWEST_OPEN_FILES = 4096, 256
SHARED_MEMORY = Path("/dev/shm")
DEVICES = Path("/dev")
BYTES_OF_A_CROP = 3 * 336 * 336 * 4  # float32


def prepare_process(use_cpu: bool, backend: str | None, timeout: int, max_image_pixels: int) -> None:
    """Sets up the process, once, before a model or data is loaded.

    Args:
        use_cpu (bool): train on the CPU, though there may be a GPU.
        backend (str, optional): of torch.distributed; by default nccl, or gloo on the CPU.
        timeout (int): of a collective operation, in seconds.
        max_image_pixels (int): largest image that is decoded, in pixels.

    Raises:
        InputError: if the machine allows too little of something.
    """
    raise_file_limit()
    limit_pixels(max_image_pixels)
    # Samples of other sizes in each step leave gaps that no later one fits. Read when the GPU's memory is first asked for.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # Its backward pass with a mask gives nan on Hopper at some lengths; without it a mask takes the memory-efficient kernel.
    # Source: https://github.com/pytorch/pytorch/issues/196678
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Started by plain python: one process, as `torchrun --nproc_per_node=1` would set it up.
    single = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    if "RANK" not in os.environ:
        # accelerate would say at length that it is not set.
        os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    for name, value in single.items():
        os.environ.setdefault(name, str(value))
    if use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    join_restarted_group(use_cpu, backend, timeout)


def runs_on_cpu(use_cpu: bool = False) -> bool:
    """Whether the process computes on the CPU: as asked, or because there is no GPU.

    Args:
        use_cpu (bool): it is asked for (--use_cpu).

    Raises:
        InputError: if there is a GPU that cannot be used: hours on the CPU are not what was meant.
    """
    if use_cpu:
        return True
    if torch.cuda.is_available():
        _check_architecture()
        return False
    # An empty CUDA_VISIBLE_DEVICES asks for the CPU too.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if torch.version.cuda and not hidden and any(DEVICES.glob("nvidia[0-9]*")):
        raise InputError(
            f"GPU: expected one that torch {torch.__version__} can use, found an NVIDIA device whose driver does not fit; "
            f"nvidia-smi says which CUDA it supports, torch is built for {torch.version.cuda}: renew the driver, or take a build for "
            "an older CUDA (docs/hardware.md); CUDA_VISIBLE_DEVICES=-1 takes the CPU"
        )
    return True


def _check_architecture() -> None:
    """Checks that torch has code for the GPU of this process."""
    if torch.version.cuda is None:  # ROCm names architectures in another way
        return
    device = min(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count() - 1)
    major, minor = torch.cuda.get_device_capability(device)
    built = torch.cuda.get_arch_list()
    # Code for sm_80 runs on sm_86 too; compute_XX is compiled for any newer GPU when it is loaded.
    for name in built:
        kind, _, digits = name.partition("_")
        # Of sm_90a the letter says that it runs on this very architecture.
        number = int("".join(filter(str.isdigit, digits)))
        if (kind == "sm" and number // 10 == major and number % 10 <= minor) or (
            kind == "compute" and number <= 10 * major + minor
        ):
            return
    older = (
        ", such as the one for CUDA 12.6: pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"
    )
    raise InputError(
        f"GPU: expected one that torch {torch.__version__} has code for ({', '.join(built)}), found {torch.cuda.get_device_name(device)} "
        f"(sm_{major}{minor}); take a build of torch that has it{older if major < 8 else ''}; CUDA_VISIBLE_DEVICES=-1 takes the CPU"
    )


def limit_pixels(count: int) -> None:
    """Sets the largest image that is opened, for this process and for those that it starts.

    Args:
        count (int): width x height, in pixels; without a call `MAX_IMAGE_PIXELS` holds.
    """
    os.environ[PIXEL_LIMIT] = str(count)
    pixel_limit()


def pixel_limit() -> int:
    """The largest image that is opened, in pixels, see `limit_pixels`."""
    limit = int(os.environ.get(PIXEL_LIMIT, MAX_IMAGE_PIXELS))
    # Pillow's own limit, which it also holds against the frames inside a file, is another one.
    Image.MAX_IMAGE_PIXELS = limit
    return limit


def raise_file_limit() -> None:
    """Raises the limit of open files: every tensor that a worker hands over is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if possible < FEWEST_OPEN_FILES:
        raise InputError(
            f"open files: expected a limit of at least {FEWEST_OPEN_FILES}, found {hard}; raise it (ulimit -Hn {OPEN_FILES})"
        )
    if soft != resource.RLIM_INFINITY and soft < possible:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))


def join_restarted_group(use_cpu: bool, backend: str | None, timeout: int) -> None:
    """Gives processes that torchrun has restarted a store of their own.

    torchrun's may still hold the addresses of the processes that are gone, and whoever starts first would connect to them
    (seen with torch 2.13, in three restarts of four). Where each group has a new store (TORCH_DISABLE_SHARE_RDZV_TCP_STORE) that
    does; and the processes of a node that has come later count fewer restarts.

    Source: https://github.com/pytorch/pytorch/issues/135712
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restart == "0" or not shared or dist.is_initialized():
        return
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart_{restart}", store)
    dist.init_process_group(
        backend or ("gloo" if use_cpu else "nccl"),
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )


def check_shared_memory(workers: int, micro_batch: int, num_crops: int, prefetch: int = 2) -> None:
    """Refuses workers whose prepared images do not fit into the shared memory in which they hand them over.

    Args:
        workers (int): of one process.
        micro_batch (int): samples of a batch.
        num_crops (int): most crops of an image, without its global view.
        prefetch (int): batches that each worker prepares ahead.

    Raises:
        InputError: with what is there and what is needed, if not even one image for each sample fits.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = processes * workers * prefetch * micro_batch * (num_crops + 1) * BYTES_OF_A_CROP
    if not needed or not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise InputError(
            f"shared memory ({SHARED_MEMORY}): expected {needed / 1e6:.0f} MB for {processes} x {workers} workers that prepare "
            f"images, found {free / 1e6:.0f} MB; docker run --ipc=host (or --shm-size=8g), or --dataloader_num_workers 0"
        )


def batches_ahead(workers: int, rounds: int, micro_batch: int, num_crops: int) -> int:
    """Batches that each worker prepares ahead: all micro-batches of the next step, as far as shared memory goes.

    The Trainer asks for all of them before the step begins; with fewer, the GPU would wait for the rest.

    Args:
        workers (int): of one process, at least 1.
        rounds (int): micro-batches of a step.
        micro_batch, num_crops: see `check_shared_memory`.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = -(-rounds // workers)
    if SHARED_MEMORY.is_dir():
        batch = micro_batch * (num_crops + 1) * BYTES_OF_A_CROP
        # Half of it: a sample may hold several images.
        needed = min(needed, shutil.disk_usage(SHARED_MEMORY).free // (2 * processes * workers * batch))
    return max(2, needed)


def use_gloo_in_deepspeed() -> None:
    """Keeps DeepSpeed from compiling a communication kernel for the CPU at first use.

    A run that is killed meanwhile leaves a lock on which all later runs wait without a word. Not named here, it is not built:
    gloo does its work.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}
