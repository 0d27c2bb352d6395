"""The samples of a step: every one once an epoch, the same on any number of ranks, arranged so that the ranks wait little."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetuning.data.sampler import StepSampler


def cut(items: list, size: int) -> list[list]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def cost(micro_batch: list[int], padding_free: bool) -> int:
    """Tokens that a micro-batch of these lengths is computed with."""
    return sum(micro_batch) if padding_free else len(micro_batch) * max(micro_batch, default=0)


def deal_naively(lengths: list[int], groups: int, micro_batch: int, padding_free: bool) -> list[list[int]]:
    """The lengths of a step in micro-batches, the most expensive first."""
    lengths = sorted(lengths, reverse=True)
    found = [[] for _ in range(groups)]
    if padding_free:
        for length in lengths:
            min((group for group in found if len(group) < micro_batch), key=sum).append(length)
        return sorted(found, key=sum, reverse=True)
    # sizes that differ by one at most, the smaller ones for the longest samples
    at = 0
    for number in range(groups):
        size = len(lengths) // groups + (number >= groups - len(lengths) % groups)
        found[number] = lengths[at : at + size]
        at += size
    return found


def steps_of(sampler: StepSampler, samples: int) -> list[list[list[int | None]]]:
    """The micro-batches of each step, from what the sampler gives and what DESIGN.md says of its steps."""
    places, found = list(sampler), []
    while samples > 0 and places:
        count = min(samples, sampler.batch_size)
        rounds = math.ceil(count / (sampler.ranks * sampler.micro_batch))
        size = rounds * sampler.ranks * sampler.micro_batch
        found.append(cut(places[:size], sampler.micro_batch))
        places, samples = places[size:], samples - count
    assert not places
    return found


SIZES = st.integers(1, 4), st.integers(1, 4), st.integers(1, 13), st.integers(0, 40)


@given(*SIZES, st.booleans(), st.booleans(), st.randoms())
def test_every_sample_comes_once_in_the_step_that_the_order_gives_it(
    ranks, micro, batch, samples, padding_free, drop_last, chance
):
    order = list(range(samples))
    chance.shuffle(order)
    lengths = [chance.randint(1, 50) for _ in order]
    sampler = StepSampler(order, lengths.__getitem__, batch, micro, ranks, padding_free, drop_last)
    places = list(sampler)
    assert len(sampler) == len(places)
    assert places == list(sampler)
    wanted = cut(order, batch)
    if drop_last and wanted and len(wanted[-1]) < batch:
        wanted.pop()
    found = steps_of(sampler, sum(map(len, wanted)))
    for step, micro_batches in zip(wanted, found, strict=True):
        together = [index for group in micro_batches for index in group]
        # In as few rounds as the step needs, so that only places of the last one stay empty.
        assert 0 <= together.count(None) < ranks * micro
        assert sorted(index for index in together if index is not None) == sorted(step)


@given(*SIZES, st.booleans(), st.randoms())
def test_no_rank_is_empty_where_it_could_have_a_sample(ranks, micro, batch, samples, padding_free, chance):
    lengths = [chance.randint(1, 50) for _ in range(samples)]
    sampler = StepSampler(range(samples), lengths.__getitem__, batch, micro, ranks, padding_free)
    for micro_batches in steps_of(sampler, samples):
        filled = [sum(index is not None for index in group) for group in micro_batches]
        assert filled.count(0) == max(0, len(filled) - sum(filled))


@given(*SIZES, st.booleans(), st.randoms(), st.data())
def test_samples_are_arranged_by_length_within_their_step(ranks, micro, batch, samples, padding_free, chance, data):
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=samples, max_size=samples))
    order = list(range(samples))
    chance.shuffle(order)
    sampler = StepSampler(order, lengths.__getitem__, batch, micro, ranks, padding_free)
    leaders = Counter()
    steps = steps_of(sampler, samples)
    for indices, micro_batches in zip(cut(order, batch), steps, strict=True):
        groups = [[lengths[index] for index in group if index is not None] for group in micro_batches]
        naive = deal_naively([lengths[index] for index in indices], len(groups), micro, padding_free)
        # at the same time the ranks run what stands side by side in the order of costs
        for alike, together in zip(cut(naive, ranks), cut(groups, ranks), strict=True):
            expected = sorted(cost(group, padding_free) for group in alike)
            assert sorted(cost(group, padding_free) for group in together) == expected
        if len({cost(group, padding_free) for group in groups[:ranks]}) == ranks:
            leaders[max(range(ranks), key=lambda rank: cost(groups[rank], padding_free))] += 1
    if not padding_free and batch % (ranks * micro):
        # The longest samples stand in smaller micro-batches, which need not cost the most.
        return
    # no rank has the most expensive one more often than its turn comes
    assert max(leaders.values(), default=0) <= -(-len(steps) // ranks)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize(("samples", "batch"), [(12, 4), (18, 16), (33, 16), (5, 16), (7, 3), (1, 1)])
def test_a_step_has_the_same_samples_on_any_number_of_ranks(samples, batch, padding_free):
    order, lengths = list(range(samples)), [7 + 11 * number % 50 for number in range(samples)]
    random.Random(0).shuffle(order)
    found = set()
    for ranks in (1, 2, 3, 4):
        for micro in (1, 2, 3, 5, 16):
            sampler = StepSampler(order, lengths.__getitem__, batch, micro, ranks, padding_free)
            steps = [
                sorted(index for group in step for index in group if index is not None)
                for step in steps_of(sampler, samples)
            ]
            found.add(str(steps))
    assert found == {str([sorted(step) for step in cut(order, batch)])}


@pytest.mark.parametrize("padding_free", [False, True])
def test_the_ranks_wait_less_and_less_is_padded(padding_free):
    ranks, micro, accumulation, steps, chance = 8, 4, 2, 160, random.Random(0)
    batch = ranks * micro * accumulation
    lengths = [round(math.exp(chance.uniform(math.log(10), math.log(2500)))) for _ in range(batch * steps)]
    order = list(range(len(lengths)))

    def tokens(sampler) -> tuple[int, int, int, int]:
        """Of an epoch: all, padding included; of the slowest rank, where the ranks wait for each other in each micro-step, and
        where they wait in each step; and the most in a micro-batch."""
        costs = [cost(group, padding_free) for group in cut([lengths[index] for index in sampler], micro)]
        together = cut(costs, ranks)
        sums = [map(sum, zip(*step, strict=True)) for step in cut(together, accumulation)]
        return sum(costs), sum(map(max, together)), sum(map(max, sums)), max(costs)

    arranged = StepSampler(order, lengths.__getitem__, batch, micro, ranks, padding_free)
    before, after = tokens(order), tokens(arranged)
    if padding_free:
        assert before[0] == after[0] == sum(lengths)
        # nearly what the longest sample alone takes
        assert after[3] < 1.1 * max(lengths) < 0.5 * before[3]
    else:
        assert before[0] - sum(lengths) > 10 * (after[0] - sum(lengths))
    assert before[1] > 1.7 * after[1]
    assert before[2] > 1.5 * after[2]


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_step_that_fills_no_round_gives_every_rank_like_work(padding_free):
    # 9 samples on 4 ranks with micro-batches of 2: two rounds, 8 micro-batches, and one of them takes two samples.
    lengths = [90, 80, 70, 60, 50, 40, 30, 2, 1]
    (step,) = steps_of(StepSampler(range(9), lengths.__getitem__, 9, 2, 4, padding_free), 9)
    groups = sorted(sorted(lengths[index] for index in group if index is not None) for group in step)
    assert groups == [[1, 2], [30], [40], [50], [60], [70], [80], [90]]


def test_an_epoch_is_passed_on_to_the_order():
    class Order(list):
        def set_epoch(self, epoch):
            self[:] = [epoch]

    order = Order([0])
    sampler = StepSampler(order, {0: 1, 1: 1, 3: 1}.__getitem__, 1, 1, 1)
    sampler.set_epoch(3)
    assert list(sampler) == [3]
    StepSampler([1], {0: 1, 1: 1, 3: 1}.__getitem__, 1, 1, 1).set_epoch(3)
