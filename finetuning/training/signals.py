"""SIGTERM and SIGINT, noted until the run can stop where it loses nothing."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader


class StopSignals:
    """Notes SIGTERM and SIGINT, so that a run can stop where it loses nothing; a second one stops at once.

    What comes within two seconds counts as one: launcher and scheduler often both send it. For the workers of a DataLoader see
    `spare_workers`.
    """

    def __init__(self):
        self.signum, self._since, self._pid = 0, 0.0, os.getpid()

    def install(self) -> None:
        """From now on signals are noted."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._note)

    def _note(self, signum, frame):
        if self.signum and (time.monotonic() - self._since > 2 or os.getpid() != self._pid):
            os._exit(128 + signum)
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()

    def agree(self, device: torch.device) -> int:
        """The signal that any rank has received, 0 for none; all ranks must ask together."""
        if not dist.is_initialized():
            return self.signum
        flag = torch.tensor(self.signum, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)


stop_signals = StopSignals()


def spare_workers(loader: DataLoader) -> DataLoader:
    """Has the workers of a DataLoader live on when a scheduler signals every process, as Slurm does: the step needs them.

    They end with the second signal, which is the DataLoader's. torch gives them a handler that ends them at the first one,
    unless it is their parent's, and the run then fails instead of saving.
    """
    loader.worker_init_fn = partial(_begin_worker, loader.worker_init_fn)
    return loader


def _begin_worker(begin: Callable[[int], None] | None, worker: int) -> None:
    if begin is not None:
        begin(worker)
    # What Python knows of the process that this one was forked from, not of torch's handler.
    if callable(handler := signal.getsignal(signal.SIGTERM)):
        signal.signal(signal.SIGTERM, handler)
