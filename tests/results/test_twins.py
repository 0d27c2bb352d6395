"""Pictures that are the same or look the same, with the same question and other answers."""

import io
import itertools

import numpy as np
import pytest
import recipe
import tiny
from PIL import Image, ImageDraw

from finetuning.data.perceptual import NEAR, hash_bits, identify_look
from finetuning.results import twins
from finetuning.results.twins import Asked, Twin, find_twins, near_pairs


def drawn(seed: int, size: tuple[int, int] = (300, 240)) -> Image.Image:
    """A page of boxes, as a photograph has its shapes."""
    values = np.random.default_rng(seed)
    image = Image.new("RGB", size, "white")
    for _ in range(25):
        x, y, width, height = (int(value) for value in values.integers(10, 200, 4))
        ImageDraw.Draw(image).rectangle(
            (x, y, x + width // 2, y + height // 2), tuple(map(int, values.integers(0, 255, 3)))
        )
    return image


def saved_again(image: Image.Image, quality: int = 60) -> Image.Image:
    buffer = io.BytesIO()
    image.resize((image.width // 2, image.height // 2)).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def asked(image: Image.Image | list, answer: str, question: str = "How many?") -> Asked:
    pictures = [list(identify_look(each)) for each in (image if isinstance(image, list) else [image])]
    return Asked(question, [answer], pictures)


def test_a_picture_saved_again_is_near_and_others_are_not():
    looks = [identify_look(drawn(seed)) for seed in range(20)]
    again = [identify_look(saved_again(drawn(seed))) for seed in range(20)]
    bits = hash_bits([look for _, look in looks + again])
    near = near_pairs(bits[:, None])
    assert [[number for number, _ in found] for found in near[:20]] == [[number + 20] for number in range(20)]
    assert {digest for digest, _ in looks}.isdisjoint(digest for digest, _ in again)


def test_only_the_same_question_with_other_answers_counts():
    page, other = drawn(1), drawn(2)
    items = [
        asked(page, "7"),
        asked(page, "8"),
        asked(page, " 7 "),
        asked(page, "9", "How old?"),
        asked(other, "8"),
        asked(saved_again(page), "5"),
        Asked("How many?", ["7"], []),
        asked([page, other], "1"),
    ]
    found = find_twins(items)
    assert [sorted(twin.number for twin in of_one) for of_one in found] == [
        [1, 5],
        [0, 2, 5],
        [1, 5],
        [],
        [],
        [0, 1, 2],
        [],
        [],
    ]
    assert found[0][0] == Twin(1, -1)
    assert 0 <= found[0][1].bits <= NEAR


def test_an_acceptable_answer_in_common_is_no_contradiction():
    page = drawn(1)
    first, second = asked(page, "85.54"), asked(page, "RM 85.54")
    second.answers = ["rm  85.54", "85.54"]
    assert find_twins([first, second]) == [[], []]


def test_all_pictures_of_a_row_must_be_alike():
    one, two, three = (drawn(seed) for seed in range(3))
    items = [
        asked([one, two], "yes"),
        asked([one, three], "no"),
        asked([one, saved_again(two)], "no"),
        asked([two, one], "no"),
    ]
    assert [[twin.number for twin in of_one] for of_one in find_twins(items)] == [[2], [], [0], []]


def test_near_pairs_are_those_of_all_pairs(monkeypatch):
    # Small blocks, so that there are several.
    monkeypatch.setattr(twins, "PAIRS_AT_ONCE", 100)
    values = np.random.default_rng(0)
    bits = values.integers(0, 2, (40, 1, 256))
    for number in range(20):  # some bits of another one turned
        places = values.choice(256, values.integers(NEAR - 3, NEAR + 4), replace=False)
        bits[20 + number] = bits[number]
        bits[20 + number, 0, places] ^= 1
    hashes = np.packbits(bits.astype(bool), axis=-1).view(np.uint64)
    differ = {(a, b): int((bits[a] != bits[b]).sum()) for a, b in itertools.permutations(range(40), 2)}
    expected = [sorted((b, d) for (a, b), d in differ.items() if a == number and d <= NEAR) for number in range(40)]
    assert any(expected)
    assert [sorted(found) for found in near_pairs(hashes)] == expected


def test_blank_pages_are_bounded():
    blank = [asked(Image.new("L", (50 + number, 50), "white"), str(number)) for number in range(60)]
    assert all(len(found) == twins.MOST_TWINS for found in find_twins(blank))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16", "CMYK"])
def test_every_mode_has_a_look(mode):
    digest, look = identify_look(
        tiny.picture(40, 30).convert("L").convert(mode) if mode != "RGBA" else recipe.page("1").convert(mode)
    )
    assert len(digest) == 32
    assert len(look) == 64
