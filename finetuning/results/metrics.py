"""Scores of generated answers."""

from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5


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


def find_class(classes: list[str], texts: list[str]) -> int | None:
    """Number of the class that one of the texts names as the scores compare: "Yes" is "Yes."."""
    return next((number for number, name in enumerate(classes) if exact_match(name, texts)), None)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().lower()
