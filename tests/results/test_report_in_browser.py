"""The report in a real browser: filters, search, pictures, keys, thousands of rows, nothing hostile runs, a narrow screen.

Skipped where there is no Chromium (Debian: apt-get install chromium) or no playwright.
"""

import functools
import io
import json
import random
import time

import made_run
import pytest
import recipe
from made_run import LOGS, leave, report, rows
from PIL import Image

from benchmarks.screenshots import browser_path
from finetuning.compare import main as compare
from finetuning.results.charts import Line, line_chart

playwright = pytest.importorskip("playwright.sync_api")
if browser_path() is None:
    pytest.skip("no Chromium here", allow_module_level=True)

ATTACKS = [
    "<script>window.hurt = 1</script>",
    "</script><script>window.hurt = 1</script>",
    "<img src=x onerror=\"window.hurt = 1\">",
    "\"><svg onload=window.hurt=1>",
    "<iframe srcdoc=\"<script>parent.hurt = 1</script>\"></iframe>",
    "<a href=\"javascript:window.hurt=1\">x</a>",
    "<style>* { display: none !important }</style>",
    "<!--", "]]>", "{{ 7 * 7 }}", "${window.hurt = 1}", "<|image_1|><b>", "__proto__", "&lt;script&gt;",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # Without a sandbox of its own, which needs rights that root in a container lacks; the pages are our own.
        opened = driver.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser):
    """path -> a page in which every error and every attempt to leave the file is noted."""
    contexts = []

    def open_one(path, width=1280, **settings):
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.faults, page.requests = [], []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_one
    for context in contexts:
        context.close()


@functools.cache
def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    # Noise: each thumbnail takes all the bytes that it may.
    picture = Image.effect_noise((160, 160), 60 + number)
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def many(count: int) -> list[dict]:
    """Every tenth row is wrong, every hundredth became so."""
    return [
        {
            **row,
            "question": f"<|image_1|>\nWhich page is number {row['id']}?",
            "images": [{"bytes": picture(number % 50), "path": None}],
            "after": "" if number % 20 == 0 else "x" if number % 10 == 0 else str(number),
            "before": str(number) if number % 100 == 0 else "?",
        }
        for number, row in enumerate(rows(count, images=[]))
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The page of 120 rows."""
    folder = tmp_path_factory.mktemp("small")
    found = many(120)
    leave(folder, found, {"before": lambda turn: turn["before"], "after": lambda turn: turn["after"]})
    report(folder, found)
    return folder / "report.html"


def ids(page) -> list[str]:
    return page.locator("#rows .id").all_text_contents()


def expect_rows(page, count: int) -> None:
    playwright.expect(page.locator("#rows .row")).to_have_count(count)


def wait_until(page, script: str) -> None:
    """Asks again and again: the page's policy keeps the driver from waiting inside of it."""
    end = time.monotonic() + 10
    while not page.evaluate(script):
        assert time.monotonic() < end, script
        time.sleep(0.02)


def test_the_page_works_without_a_fault_or_a_request(open_page, small):
    page = open_page(small)
    assert page.locator("#rows .row").count() == 50
    assert page.locator("#count").inner_text() == "1 – 50 of 120 rows"
    wait_until(page, "document.querySelector('#rows img').naturalWidth > 0")
    assert page.faults == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []


def test_rows_stand_worst_first_and_a_filter_shows_its_rows(open_page, small):
    page = open_page(small)
    # those that were right before stand first
    assert ids(page)[:3] == ["r0", "r100", "r10"]
    page.get_by_role("button", name="Wrong 12").click()
    assert len(ids(page)) == 12
    page.get_by_role("button", name="Became worse 2").click()
    assert ids(page) == ["r0", "r100"]
    assert page.get_by_role("button", name="Became worse 2").get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="All 120").click()
    page.locator("#order").select_option("data")
    assert ids(page)[:3] == ["r0", "r1", "r2"]


def test_an_empty_answer_and_an_image_tag_are_shown_as_such(open_page, small):
    page = open_page(small)
    first = page.locator("#rows .row").first
    assert first.locator(".answer.empty.bad").inner_text() == "✗ (empty answer)"
    assert first.locator(".answer.good").inner_text() == "✓ 0"
    assert first.locator(".question .tag").inner_text() == "<|image_1|>"


def test_search_finds_questions_answers_and_ids_and_says_when_there_is_none(open_page, small):
    page = open_page(small)
    page.locator("#search").fill("NUMBER R77?")
    expect_rows(page, 1)
    assert ids(page) == ["r77"]
    assert page.locator("mark").first.inner_text() == "number r77?"
    page.locator("#search").fill("no such thing")
    page.get_by_text("No row fits.").wait_for()
    page.locator("#search").press("Escape")
    expect_rows(page, 50)


def test_the_address_keeps_what_is_shown(open_page, small):
    page = open_page(small)
    page.get_by_role("button", name="Wrong 12").click()
    again = page.context.new_page()
    again.goto(page.url)
    assert page.url.endswith("#filter=wrong")
    assert again.locator("#rows .row").count() == 12
    again.goto(small.as_uri() + "#filter=nonsense&page=99&class=7x&order=%3Cb%3E")
    again.reload()
    assert again.locator("#count").inner_text().endswith(("of 120 rows", "0 rows"))


def test_pages_reach_every_row(open_page, small):
    page = open_page(small)
    seen = ids(page)
    for name in ("page 2", "page 3"):
        page.get_by_role("button", name=name).click()
        seen += ids(page)
    assert sorted(seen) == sorted(f"r{number}" for number in range(120))


def test_a_picture_is_shown_large_by_a_click_and_by_keys(open_page, small):
    page = open_page(small)
    page.locator("#rows .pictures button").first.click()
    dialog = page.locator("#large")
    assert dialog.is_visible()
    assert dialog.locator("p").inner_text() == "r0"
    wait_until(page, "document.querySelector('#large img').naturalWidth > 0")
    assert dialog.locator("img").bounding_box()["width"] >= 480
    page.keyboard.press("ArrowRight")
    assert dialog.locator("p").inner_text() == "r100"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    # back where it was opened
    assert page.evaluate("document.activeElement === document.querySelector('#rows .pictures button')")
    page.keyboard.press("Enter")
    assert dialog.is_visible()
    page.locator("#close").click()
    assert not dialog.is_visible()


def test_the_page_can_be_used_by_keys_alone(open_page, small):
    page = open_page(small)
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("r7/")
    assert page.locator("#search").input_value() == "r7/"
    page.keyboard.press("Escape")
    expect_rows(page, 50)
    page.keyboard.press("ArrowRight")
    assert page.locator("#count").inner_text() == "51 – 100 of 120 rows"
    first = page.evaluate("document.activeElement.querySelector('.id').textContent")
    page.keyboard.press("ArrowDown")
    second = page.evaluate("document.activeElement.querySelector('.id').textContent")
    assert [first, second] == ids(page)[:2]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#count").inner_text() == "1 – 50 of 120 rows"
    # tab reaches a filter, which enter chooses
    page.locator('[data-filter="all"]').focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert len(ids(page)) == 12


def test_thumbnails_are_attached_only_when_they_come_into_sight(open_page, small):
    page = open_page(small)
    wait_until(page, "document.querySelector('#rows img').naturalWidth > 0")
    attached = page.evaluate("[...document.querySelectorAll('#rows img')].map((image) => image.hasAttribute('src'))")
    assert attached[0]
    assert not attached[-1]
    page.locator("#rows img").last.scroll_into_view_if_needed()
    wait_until(page, "[...document.querySelectorAll('#rows img')].at(-1).naturalWidth > 0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_scrolls_in_one_direction_only(open_page, small, scheme):
    page = open_page(small, 390, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#rows .pictures button").first.click()
    box = page.locator("#large img").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(","))) > 380) == (scheme == "light")


def test_long_words_do_not_widen_a_narrow_screen(open_page, tmp_path):
    long = "x" * 300
    found = rows(3, id=long, question=long, references=[long], answer=long)
    attempt = {
        "command": ["torchrun", "a.py", f"--{long}", long],
        "changed": {long: long},
        "model": long,
        "ending": long,
    }
    leave(tmp_path, found, {"before": long, "after": long}, attempt={**attempt, "state": "failed"}, summary=long)
    report(tmp_path, found, title=long)
    assert open_page(tmp_path / "report.html", 390).evaluate("document.documentElement.scrollWidth") <= 390


def test_five_thousand_rows_load_within_two_seconds_and_twenty_megabytes(open_page, tmp_path):
    found = many(5000)
    leave(tmp_path, found, {"before": lambda turn: turn["before"], "after": lambda turn: turn["after"]})
    report(tmp_path, found)
    path = tmp_path / "report.html"
    assert 15_000_000 < path.stat().st_size <= 20_000_000
    page = open_page(tmp_path / "report.html")
    loaded = page.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart")
    assert loaded < 2000
    assert page.locator("#count").inner_text() == "1 – 50 of 5,000 rows"
    start = time.monotonic()
    page.locator("#search").fill("number r4321?")
    expect_rows(page, 1)
    assert time.monotonic() - start < 2
    assert ids(page) == ["r4321"]


@pytest.mark.parametrize("place", ["texts", "names", "compare"])
def test_nothing_hostile_runs(open_page, tmp_path, place):
    attacks = [*ATTACKS, *(attack * 3 for attack in ATTACKS)]
    found = [
        {
            **{"id": attack if place == "names" else str(number), "question": attack, "references": [attack, "b"]},
            "images": [recipe.page("x")],
        }
        for number, attack in enumerate(attacks)
    ]

    def score(predictions):
        figures = made_run.score(predictions)
        return figures | {f"accuracy/{attack}": 0.5 for attack in attacks if place == "names"}

    settings = {name: ATTACKS[1] for name in ("commit", "device", "strategy", "model", "data", "ending")}
    settings |= {"command": ATTACKS, "versions": dict.fromkeys(ATTACKS, ATTACKS[2]), "state": "failed"}
    settings |= {"changed": dict.fromkeys(ATTACKS, ATTACKS[2])}
    folder = tmp_path / (ATTACKS[0].replace("/", "") if place == "compare" else "run")
    folder.mkdir()
    answers = {"before": random.Random(0).choice(ATTACKS), "after": lambda turn: turn["question"] * 2}
    leave(folder, found, answers, attempt=settings, summary=ATTACKS[1])
    report(folder, found, title=" ".join(ATTACKS), score=score)
    path = folder / "report.html"
    if place == "compare":
        (tmp_path / "compare").mkdir()
        path = tmp_path / "compare" / "compare.html"
        assert compare([str(folder), str(folder), "--out", str(path)]) == 0
    page = open_page(path)
    page.get_by_text("Wrong").first.click()
    page.locator("#search").fill("<")
    page.wait_for_timeout(300)
    page.locator("#rows .pictures button").first.click()
    page.wait_for_timeout(200)
    assert page.evaluate("window.hurt") is None
    assert page.faults == []
    assert page.locator("#rows script, #rows iframe, #rows a, #rows style, #rows svg").count() == 0
    assert page.locator("main script, main iframe, main style, main img[src=x]").count() == 0
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    assert page.locator("body").is_visible()


def test_the_policy_holds_even_if_a_text_were_to_become_an_element(open_page, small):
    page = open_page(small)
    page.add_init_script("")
    caught = page.evaluate(
        """() => {
            try { document.body.innerHTML += "<img src=x onerror='window.hurt = 1'>"; return "written"; }
            catch (error) { return error.name; }
        }"""
    )
    assert caught == "TypeError"
    # nor does a handler, a script of another text, or a picture from elsewhere
    page.evaluate(
        """() => {
            const image = document.createElement("img");
            image.setAttribute("src", "https://example.invalid/x.png");
            document.body.append(image);
        }"""
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.hurt") is None
    assert any("Content Security Policy" in fault for fault in page.faults)


def closed(folder):
    found = [
        {"id": str(number), "turns": [{"question": "Hateful?", "references": [("No.", "Yes.")[number % 3 == 0]],
         "images": [], "choices": ["No.", "Yes."], "number": number}]}
        for number in range(30)
    ]  # fmt: skip

    def answer(turn):
        return ("Yes." if turn["number"] % 2 else "No."), {"No.": -1.0, "Yes.": -1.0 - turn["number"] / 10}

    leave(folder, found, {"after": answer})
    report(folder, found)
    return folder / "report.html"


def test_a_class_and_a_cell_of_the_confusion_matrix_choose_rows(open_page, tmp_path):
    page = open_page(closed(tmp_path))
    page.locator("#class").select_option(label="Yes.")
    assert sorted(map(int, ids(page))) == list(range(0, 30, 3))
    page.get_by_role("button", name="expected Yes., answered No.: 5").click()
    assert sorted(map(int, ids(page))) == list(range(0, 30, 6))
    assert "“Yes.” answered with “No.”" in page.locator("#chosen").inner_text()
    page.get_by_role("button", name="show all").click()
    assert len(ids(page)) == 30


def test_pointing_at_a_chart_says_its_values(open_page, small):
    page = open_page(small)
    chart = page.locator('[data-chart="0"]')
    chart.locator("svg").hover(position={"x": 500, "y": 100})
    assert chart.locator(".note").inner_text() == "step 4: training 1"


def test_print_shows_the_rows_without_the_tools(open_page, small):
    page = open_page(small)
    page.emulate_media(media="print")
    assert not page.locator(".tools").is_visible()
    assert page.locator("#rows .row").first.is_visible()
    assert len(page.pdf()) > 10_000


def test_turns_that_did_not_change_share_a_line(open_page, tmp_path):
    found = rows(1)
    leave(tmp_path, found, {"before": "?", "step 1": "?", "step 2": "7", "step 10": "0", "after": "0"}, logs=LOGS)
    report(tmp_path, found)
    page = open_page(tmp_path / "report.html")
    assert page.locator(".answers th").all_inner_texts() == ["expected", "before – step 1", "step 2", "step 10 – after"]


def test_a_browser_without_script_still_shows_the_first_screen(open_page, small):
    page = open_page(small, java_script_enabled=False)
    assert page.get_by_role("heading", name="DocVQA").is_visible()
    assert page.locator("svg").first.is_visible()


def test_a_chart_without_a_second_value_is_drawn():
    assert "<circle" in line_chart("x", [Line("one", [(0, 0.0)])]).svg
    assert json.dumps(line_chart("x", [Line("one", [(0, 0.0)])]).data)


def test_a_picture_that_is_larger_than_needed_is_shrunk_once(tmp_path):
    found = rows(1, images=[Image.new("RGB", (3000, 2000), "white")])
    leave(tmp_path, found, {"after": "0"})
    assert len(report(tmp_path, found)) < 120_000
