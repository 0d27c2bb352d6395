"""SIGTERM and SIGINT, noted until the run can stop where it loses nothing."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Notes SIGTERM and SIGINT, so that a run can stop where it loses nothing; a second one stops at once.

    What comes within two seconds counts as one: launcher and scheduler often both send it. For the workers of a DataLoader see
    `spare_workers`.
    """

    def __init__(self):
        self.signum, self._since = 0, 0.0

    def install(self) -> None:
        """From now on signals are noted."""
        for signum in SIGNALS:
            signal.signal(signum, self._note)

    def _note(self, signum, frame):
        if self.signum and time.monotonic() - self._since > 2:
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
    """Has the workers of a DataLoader live on when every process is signalled: the step that is then saved needs them.

    A scheduler such as Slurm signals all processes, and torchrun all of a rank's group. torch has workers die of it, and the run
    would fail instead of saving. They end when the DataLoader tells them to, and seconds after their rank.
    """
    loader.worker_init_fn = partial(_begin_worker, loader.worker_init_fn)
    return loader


def _begin_worker(begin: Callable[[int], None] | None, worker: int) -> None:
    if begin is not None:
        begin(worker)
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
