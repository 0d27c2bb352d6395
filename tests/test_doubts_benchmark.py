"""benchmarks/doubts.py: what is swapped and what is counted as found."""

import recipe

from benchmarks.doubts import found_in_worst, swap_answers


def rows() -> list[dict]:
    # A third of the rows have the same answer, so that some swaps would change nothing.
    return [{"id": str(number), "answers": [str(number % 3 and number)]} for number in range(60)]


def test_swapped_rows_get_the_answers_of_others_always_the_same_ones():
    found = rows()
    before = {item["id"]: item["answers"] for item in found}
    swapped = swap_answers(found, seed=1)
    assert len(swapped) == 3
    changed = {item["id"] for item in found if item["answers"] != before[item["id"]]}
    assert changed == set(swapped)
    assert sorted(before[name] for name in swapped) == sorted(
        item["answers"] for item in found if item["id"] in changed
    )
    again = rows()
    assert swap_answers(again, seed=1) == swapped
    assert swap_answers(again, seed=2) != swapped


def test_the_share_is_of_the_swapped_rows_that_stand_among_the_first(tmp_path):
    path = recipe.write_jsonl(tmp_path / "doubts.jsonl", [{"id": str(number)} for number in range(40)])
    assert found_in_worst(path, ["0", "1", "3", "39"]) == {"5%": 0.5, "10%": 0.75}
