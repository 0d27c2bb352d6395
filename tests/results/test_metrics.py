"""ANLS as the DocVQA benchmark defines it, against an independent account of that definition; exact match, ROUGE-L, contains."""

import dataclasses
import random

import pytest

from finetuning.own_data_arguments import OwnDataArguments
from finetuning.results.metrics import METRICS, anls, contains, exact_match, rouge_l, usual_metric


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


# ---- ROUGE-L and contains


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """By the textbook's table."""
    row = [0] * (len(b) + 1)
    for left in a:
        above, row = row, [0]
        for j, right in enumerate(b, 1):
            row.append(above[j - 1] + 1 if left == right else max(above[j], row[-1]))
    return row[-1]


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # The example of package rouge-score.
    fox = "The quick brown fox jumps over the lazy dog"
    assert rouge_l("The quick brown dog jumps on the log.", [fox]) == pytest.approx(10 / 17)
    chooser = random.Random(0)
    for _ in range(200):
        texts = [[chooser.choice("abcdef") for _ in range(chooser.randint(1, 12))] for _ in range(3)]
        answer, *references = (" ".join(words) for words in texts)
        scores = []
        for words in texts[1:]:
            common = longest_common_subsequence(texts[0], words)
            precision, recall = common / len(texts[0]), common / len(words)
            scores.append(2 * precision * recall / (precision + recall) if common else 0)
        assert rouge_l(answer, references) == pytest.approx(max(scores))


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [("Größe: 12", "größe 12", 1), ("这是猫", "这是狗", 2 / 3), ("", "a", 0), ("...", "!", 0), ("a b", "b a", 0.5)],
)
def test_rouge_l_knows_the_letters_of_all_scripts(answer, reference, score):
    assert rouge_l(answer, [reference]) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    [
        ("It is 12 March, I think.", ["12 march"], True),
        ("It is 12 March, I think.", ["13", "MARCH"], True),
        ("I know", ["no"], False),
        ("112", ["12"], False),
        ("12,\nMarch", ["12 March"], True),
        ("12 of March", ["12 March"], False),
        ("Das sind 5 €", ["€"], True),
        ("这是猫。", ["猫"], True),
        ("", ["a"], False),
    ],
)
def test_contains_goes_by_whole_words(answer, references, right):
    assert contains(answer, references) is right


def test_the_usual_metric_follows_from_the_answers_length():
    assert usual_metric(["yes", "no", "a long answer of many words that is an exception"]) == "exact_match"
    assert usual_metric(["12 March 2024"] * 3) == "anls"
    assert usual_metric(["One sentence " * 8]) == "rouge_l"
    assert usual_metric([]) == "exact_match"


def test_every_metric_of_the_flag_is_there():
    [flag] = [field for field in dataclasses.fields(OwnDataArguments) if field.name == "metric"]
    assert list(METRICS) == flag.metadata["choices"]
