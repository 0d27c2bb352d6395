"""The loss of each source of rows by itself, for the log."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from phi3v.modeling_phi3_v import IGNORE_INDEX


class SourceLosses:
    """Sums losses and labels by source between two log steps.

    A micro-batch with samples of several sources counts for none: its loss is known only as one number. With one sample at once,
    the default, each counts. What is summed stays on the device until it is logged.

    Args:
        names (Sequence[str]): the sources, the same on all ranks; none or one: nothing is counted.
    """

    def __init__(self, names: Sequence[str] = ()):
        self._places = {name: place for place, name in enumerate(names)} if len(names) > 1 else {}
        self._sums = torch.zeros(2, len(self._places))  # losses, labels

    def count(self, inputs: dict[str, Any], loss: torch.Tensor, labels_of_step: Any) -> None:
        """Counts a micro-batch; `RecipeTrainer.training_step` calls it.

        Args:
            inputs (dict): a batch of `DataCollatorForPhi3V`.
            loss (torch.Tensor): its share in the mean loss of the step over all ranks.
            labels_of_step (int or torch.Tensor): of all micro-batches of all ranks.
        """
        sources = set(inputs.get("sources", ()))
        if not self._places or len(sources) != 1:
            return
        labels = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        self._sums = self._sums.to(loss.device)
        self._sums[:, self._places[sources.pop()]] += torch.stack([loss.detach() * labels_of_step, labels])

    def pop(self) -> dict[str, float]:
        """Mean loss of a label of each source that was trained since the last log, `loss/receipts`; all ranks call it together."""
        if not self._places:
            return {}
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        losses, labels = self._sums.tolist()
        self._sums = torch.zeros_like(self._sums)
        return {f"loss/{name}": losses[at] / labels[at] for name, at in self._places.items() if labels[at]}
