"""What a process needs before it starts: ranks, open files, shared memory, and its part in a restarted group of processes."""

import os
import resource
import shutil
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from PIL import Image

from .errors import InputError

MAX_IMAGE_PIXELS = 180_000_000
# A variable of the environment reaches the workers of a DataLoader however they are started, forked or spawned.
PIXEL_LIMIT = "PHI3V_MAX_IMAGE_PIXELS"
OPEN_FILES, FEWEST_OPEN_FILES = 4096, 256
SHARED_MEMORY = Path("/dev/shm")
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


def check_shared_memory(workers: int, micro_batch: int, num_crops: int) -> None:
    """Refuses workers whose prepared images do not fit into the shared memory in which they hand them over.

    Args:
        workers (int): of one process.
        micro_batch (int): samples of a batch.
        num_crops (int): most crops of an image, without its global view.

    Raises:
        InputError: with what is there and what is needed, if not even one image for each sample of one batch a worker fits.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = processes * workers * micro_batch * (num_crops + 1) * BYTES_OF_A_CROP
    if not needed or not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise InputError(
            f"shared memory ({SHARED_MEMORY}): expected {needed / 1e6:.0f} MB for {processes} x {workers} workers that prepare "
            f"images, found {free / 1e6:.0f} MB; docker run --ipc=host (or --shm-size=8g), or --dataloader_num_workers 0"
        )


def use_gloo_in_deepspeed() -> None:
    """Keeps DeepSpeed from compiling a communication kernel for the CPU at first use.

    A run that is killed meanwhile leaves a lock on which all later runs wait without a word. Not named here, it is not built:
    gloo does its work.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}
