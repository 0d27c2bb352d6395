"""The loss of each source against a mean over its labels."""

import pytest
import torch

from finetuning.training.source_losses import SourceLosses


def batch(*sources: str, labels: int) -> dict:
    row = torch.full((len(sources), 6), -100)
    row[0, 6 - labels :] = 1
    return {"sources": list(sources), "labels": row}


def test_means_are_over_the_labels_of_each_source():
    found = SourceLosses(["a", "b", "c"])
    # (source, labels, loss of a label); the step has 10 labels, and the loss of a micro-batch is its share of the step's mean.
    for source, labels, loss in (("a", 2, 1.0), ("b", 5, 3.0), ("a", 3, 2.0)):
        found.count(batch(source, labels=labels), torch.tensor(loss * labels / 10), torch.tensor(10))
    assert found.pop() == pytest.approx({"loss/a": (2 * 1.0 + 3 * 2.0) / 5, "loss/b": 3.0})
    assert found.pop() == {}


def test_a_micro_batch_of_several_sources_or_of_none_counts_for_none():
    found = SourceLosses(["a", "b"])
    found.count(batch("a", "b", labels=2), torch.tensor(1.0), 2)
    found.count({"sources": [], "labels": torch.full((1, 2), -100)}, torch.tensor(0.0), 2)
    found.count(batch("a", "a", labels=2), torch.tensor(0.5), 4)
    assert found.pop() == {"loss/a": 1.0}


@pytest.mark.parametrize("names", [[], ["a"]])
def test_one_source_is_the_loss_itself(names):
    found = SourceLosses(names)
    found.count(batch("a", labels=2), torch.tensor(1.0), 2)
    assert found.pop() == {}
