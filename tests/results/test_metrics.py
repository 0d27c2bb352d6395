"""ANLS as the DocVQA benchmark defines it, against an independent account of that definition; exact match."""

import random

import pytest

from finetuning.results.metrics import anls, exact_match


def levenshtein(a: str, b: str) -> int:
    """Edit distance by the textbook's table."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above = row
        row = [i]
        for j, right in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
    return row[-1]


def benchmark_anls(answer: str, references: list[str]) -> float:
    """The DocVQA benchmark's words: s = 1 - NL if NL < 0.5 else 0, the maximum over the references, without case."""
    scores = []
    for reference in references:
        a, b = answer.strip().lower(), reference.strip().lower()
        distance = levenshtein(a, b) / max(len(a), len(b), 1)
        scores.append(1 - distance if distance < 0.5 else 0)
    return max(scores)


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("85.54", ["85.54"], 1),
        ("rm 85.54", ["85.54", "RM 85.54"], 1),  # best over the answers, case ignored
        (" Yes \n", ["yes"], 1),
        ("abcd", ["abce"], 0.75),
        ("abcd", ["abxy"], 0),  # a distance of 0.5 is the threshold, and counts as wrong
        ("abcde", ["abcxy"], 0.6),
        ("", ["yes"], 0),
        ("a long answer instead of one word", ["answer"], 0),
        ("Straße", ["STRASSE"], 1 - 2 / 7),  # lower case, not folded
        ("٣", ["٣"], 1),
    ],
)
def test_examples(answer, references, expected):
    assert anls(answer, references) == pytest.approx(expected)


def test_anls_equals_the_definition_on_random_texts():
    chooser = random.Random(0)

    def text() -> str:
        return "".join(chooser.choice("aAbB c") for _ in range(chooser.randrange(9)))

    scores = set()
    for _ in range(3000):
        answer, references = text(), [text() for _ in range(chooser.randrange(1, 4))]
        assert anls(answer, references) == pytest.approx(benchmark_anls(answer, references)), (answer, references)
        scores.add(round(anls(answer, references), 3))
    assert len(scores) > 8


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("Yes.", ["yes"], True),
        ("yes", ["no", " YES. "], True),
        ("yes it is", ["yes"], False),
        ("", ["yes"], False),
        ("e.g", ["e.g."], True),
    ],
)
def test_exact_match(answer, references, expected):
    assert exact_match(answer, references) is expected
