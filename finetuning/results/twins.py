"""Pictures that are the same or nearly so, with the same question and other answers: one of two such rows is wrong, or vague."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ..data.perceptual import NEAR, WORDS, hash_bits

PAIRS_AT_ONCE = 1_000_000  # that fit into the processor's cache
MOST_NEAR = 20  # others that are followed up for each one: blank pages are all alike
MOST_TWINS = 5  # of a question


@dataclass
class Asked:
    """What twins are found by.

    Args:
        question (str): text of the user.
        answers (list[str]): acceptable answers.
        pictures (list): digest and perceptual hash of each picture, see `data.perceptual.identify_look`.
    """

    question: str
    answers: list[str]
    pictures: list[list[str]]


@dataclass
class Twin:
    """Number of a question that is asked the same about the same pictures, and in how many bits of their hashes these differ at most.

    `bits` is -1 for pictures that are equal in each pixel.
    """

    number: int
    bits: int


def find_twins(asked: Sequence[Asked]) -> list[list[Twin]]:
    """The twins of each question, those with the most alike pictures first, at most `MOST_TWINS`.

    Pictures are compared within the same question alone: 100,000 of them under one question take seconds,
    or minutes where most are alike (benchmarks/results/doubts.json).
    """
    found: list[list[Twin]] = [[] for _ in asked]
    groups: dict[tuple, list[int]] = defaultdict(list)
    for number, item in enumerate(asked):
        if item.pictures:
            groups[item.question.strip().casefold(), len(item.pictures)].append(number)
    for numbers in groups.values():
        if len(numbers) > 1:
            _find_in_group(asked, numbers, found)
    return found


def _find_in_group(asked: Sequence[Asked], numbers: list[int], found: list[list[Twin]]) -> None:
    """Adds the twins among questions with the same text and as many pictures."""
    # Pictures that are equal in each pixel are one place; of its questions those with equal answers are together.
    places: dict[tuple[str, ...], int] = {}
    by_answers: list[dict[frozenset[str], list[int]]] = []
    hashes: list[str] = []
    for number in numbers:
        digests = _digests(asked[number])
        if digests not in places:
            places[digests] = len(by_answers)
            by_answers.append(defaultdict(list))
            hashes += [look for _, look in asked[number].pictures]
        by_answers[places[digests]][_answers(asked[number])].append(number)
    near = near_pairs(hash_bits(hashes).reshape(len(by_answers), -1, WORDS))
    for number in numbers:
        answers, own = _answers(asked[number]), places[_digests(asked[number])]
        others = (
            Twin(other, bits)
            for place, bits in [(own, -1), *near[own]]
            for key, many in by_answers[place].items()
            if key.isdisjoint(answers)
            for other in many
        )
        found[number] = list(islice(others, MOST_TWINS))


def _digests(item: Asked) -> tuple[str, ...]:
    return tuple(digest for digest, _ in item.pictures)


def _answers(item: Asked) -> frozenset[str]:
    return frozenset(" ".join(answer.casefold().split()) for answer in item.answers)


def near_pairs(hashes: np.ndarray) -> list[list[tuple[int, int]]]:
    """For each of n lists of pictures those whose pictures are within `NEAR` bits, one by one: number and most bits.

    The nearest first, at most `MOST_NEAR`. All pairs are compared, but most of them by one word only.

    Args:
        hashes (np.ndarray): uint64, (n, pictures, WORDS).
    """
    count = len(hashes)
    near: list[list[tuple[int, int]]] = []
    first = np.ascontiguousarray(hashes[:, 0, 0])
    block = max(1, PAIRS_AT_ONCE // count)
    for start in range(0, count, block):
        rows = hashes[start : start + block]
        maybe = np.bitwise_count(first[start : start + block, None] ^ first) <= NEAR  # (block, n)
        maybe[np.arange(len(rows)), np.arange(start, start + len(rows))] = False
        # Rows one by one: where all pictures are alike, all pairs at once would not fit into memory.
        for row, others in zip(rows, maybe, strict=True):
            candidates = np.flatnonzero(others)
            bits = np.bitwise_count(row ^ hashes[candidates]).sum(-1).max(-1)
            order = np.argsort(bits, kind="stable")[:MOST_NEAR]
            near.append([(int(candidates[place]), int(bits[place])) for place in order if bits[place] <= NEAR])
    return near
