"""The page of `finetuning.doubts` in a real browser, made without a model: order, filters, twins, hostile texts, 5,000 rows."""

import random

import pytest
from made_run import to_conversation
from test_report_in_browser import ATTACKS, LOADED, expect_rows, ids, many, wait_until
from test_report_in_browser import browser as browser
from test_report_in_browser import open_page as open_page

from finetuning.data.dataset import ConversationDataset
from finetuning.results.doubts_page import add_twins, write_doubts_page
from finetuning.results.judging import Doubt, worst_first


def doubted(number: int, row: dict, **changes) -> Doubt:
    """A doubt of 0 for every other row, whose answer the model gives itself."""
    agrees, answer = number % 2, row["references"][0]
    values = {
        "id": row["id"],
        "turn": 0,
        "where": f"data/train.jsonl:{number + 1}",
        "images": ["image"] * len(row["images"]),
        "question": row["question"],
        "answers": [answer],
        "log_likelihoods": [-0.1 if agrees else -0.1 - number],
        "model_answer": answer if agrees else "something else",
        "model_log_likelihood": -0.1,
        "doubt": 0.0 if agrees else float(number),
        "part": None,
        "pictures": [[f"{number:032x}", f"{number:064x}"]],
        "model": "m",
        "asked": "a",
    }
    return Doubt(**{**values, **changes})


def write(folder, rows, doubts, most_rows=5000):
    add_twins(doubts)
    dataset = ConversationDataset(rows, to_conversation, None, [9] * len(rows))
    facts = {"judged by": "output/docvqa"}
    write_doubts_page(folder / "doubts.html", doubts, dataset, most_rows, "Doubts about <b>data</b>", facts, True)
    return folder / "doubts.html"


def test_rows_stand_worst_first_with_their_twins_beside_them(open_page, tmp_path):
    rows = many(60)
    doubts = [doubted(number, row) for number, row in enumerate(rows)]
    # The same page twice, and one that looks like it.
    for number, bits in ((10, 10), (13, 10), (20, 11)):
        doubts[number].question = "How many?"
        doubts[number].pictures = [["same" if number != 20 else "near", f"{bits:064x}"]]
    page = open_page(write(tmp_path, rows, doubts))
    assert ids(page)[:3] == ["r58", "r56", "r54"]
    first = page.locator("#rows .row").first
    assert first.locator(".mark").inner_text() == "doubt 58"
    assert first.locator(".where").inner_text() == "train.jsonl:59"
    assert first.locator("td.value").all_text_contents() == ["6e-24%", "90.5%"]
    page.get_by_role("button", name="The model says something else 30").click()
    expect_rows(page, 30)
    page.get_by_role("button", name="Same picture, other answer 3").click()
    assert ids(page) == ["r20", "r10", "r13"]
    of_10 = page.locator("#rows .row").nth(1)
    assert [" ".join(text.split()) for text in of_10.locator(".twin").all_inner_texts()] == [
        "same picture 13 r13, train.jsonl:14",
        "looks the same 20 r20, train.jsonl:21",
    ]
    assert of_10.locator(".twin th").nth(1).get_attribute("title") == "1 of 256 bits of the pictures' hashes differ"
    # Its own, and the one that looks like it; not the equal one again.
    assert of_10.locator(".pictures button").count() == 2
    assert of_10.locator(".pictures small").all_text_contents() == ["r20"]
    of_10.locator(".pictures button").nth(1).click()
    assert page.locator("#large p").inner_text() == "r20"
    assert page.faults == []


def test_several_turns_are_one_row_and_a_doubt_that_is_no_number_stands_first(open_page, tmp_path):
    rows = many(4)
    doubts = [doubted(number, row) for number, row in enumerate(rows)]
    doubts.append(doubted(1, rows[1], turn=1, doubt=7.0, log_likelihoods=[-7.1], model_answer="x"))
    doubts[3].doubt = doubts[3].model_log_likelihood = float("nan")
    page = open_page(write(tmp_path, rows, doubts))
    assert ids(page) == ["r3", "r1", "r2", "r0"]
    assert page.locator("#rows .row").nth(1).locator(".question").count() == 2
    assert worst_first(doubts)[0].id == "r3"


def test_hostile_texts_do_nothing(open_page, tmp_path):
    rows = [
        {**row, "id": f"{number} {text}", "question": f"{text} How many?", "references": [text]}
        for number, (row, text) in enumerate(zip(many(len(ATTACKS)), ATTACKS, strict=True))
    ]
    doubts = [
        doubted(number, row, model_answer=row["references"][0], where=row["id"]) for number, row in enumerate(rows)
    ]
    for item in doubts:
        item.question, item.pictures = "the same", [["same", "0" * 64]]
    page = open_page(write(tmp_path, rows, doubts))
    expect_rows(page, len(ATTACKS))
    assert page.locator(".twin").count() == 5 * len(ATTACKS)
    assert page.evaluate("window.hurt") is None
    assert page.locator("h1").inner_text() == "Doubts about <b>data</b>"
    assert page.faults == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []


@pytest.mark.slow
def test_thousands_of_rows_load_quickly(open_page, tmp_path):
    rows, values = many(5000), random.Random(0)
    doubts = [doubted(number, row, doubt=values.expovariate(1)) for number, row in enumerate(rows)]
    path = write(tmp_path, rows, doubts)
    assert path.stat().st_size < 20_000_000
    page = open_page(path)
    expect_rows(page, 50)
    assert page.evaluate(LOADED) < 5000
    page.locator("#search").fill("r4999?")
    expect_rows(page, 1)


def test_a_narrow_screen_scrolls_in_one_direction_only(open_page, tmp_path):
    rows = many(3)
    rows[0]["references"] = ["w" * 400]
    doubts = [doubted(number, row, where="x" * 200) for number, row in enumerate(rows)]
    page = open_page(write(tmp_path, rows, doubts), width=390)
    wait_until(page, "document.querySelector('#rows img').naturalWidth > 0")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
