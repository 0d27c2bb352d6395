"""Scores of generated answers."""

import re
from collections.abc import Iterable
from statistics import median

from rapidfuzz.distance import LCSseq, Levenshtein

ANLS_THRESHOLD = 0.5
# A word; of a script without spaces (Chinese, Japanese) a character.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


def anls(answer: str, references: list[str]) -> float:
    """Normalised Levenshtein similarity of an answer to the nearest reference; its mean over rows is ANLS.

    Args:
        answer (str): generated answer.
        references (list[str]): acceptable answers.

    Returns:
        float: 1 for an equal answer, ignoring case and outer white space; 0 where half of the longer text or more would
        have to change.

    Source: Biten et al., Scene Text Visual Question Answering, 2019, equation 1, with the threshold of the DocVQA benchmark.
    """
    distance = min(
        Levenshtein.normalized_distance(answer.strip().lower(), reference.strip().lower()) for reference in references
    )
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def exact_match(answer: str, references: list[str]) -> bool:
    """Whether an answer equals a reference, ignoring case, outer white space and a full stop at the end."""
    return _plain(answer) in {_plain(reference) for reference in references}


def contains(answer: str, references: list[str]) -> bool:
    """Whether an answer holds all words of a reference one after another, ignoring case and what stands between words."""
    words = f" {' '.join(_words(answer))} "
    for reference in references:
        wanted = " ".join(_words(reference))
        if f" {wanted} " in words if wanted else reference.strip() in answer:
            return True
    return False


def rouge_l(answer: str, references: list[str]) -> float:
    """ROUGE-L of an answer and the nearest reference, 0 to 1: the F-measure of their longest common subsequence of words.

    Source: Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004, section 3, with equal weights as package
    rouge-score has them; its words are of ASCII letters and digits alone.
    """
    return max(_rouge_l(_words(answer), _words(reference)) for reference in references)


def _rouge_l(answer: list[str], reference: list[str]) -> float:
    common = LCSseq.similarity(answer, reference)
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


METRICS = {"anls": anls, "exact_match": exact_match, "rouge_l": rouge_l, "contains": contains}


def usual_metric(answers: Iterable[str]) -> str:
    """The metric for answers of such a length: exact_match up to two words, anls up to ten, else rouge_l; of half of them."""
    words = median([len(_words(answer)) for answer in answers] or [0])
    return "exact_match" if words <= 2 else "anls" if words <= 10 else "rouge_l"


def find_class(classes: list[str], texts: list[str]) -> int | None:
    """Number of the class that one of the texts names as the scores compare: "Yes" is "Yes."."""
    return next((number for number, name in enumerate(classes) if exact_match(name, texts)), None)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().lower()
