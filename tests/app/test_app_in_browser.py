"""The page of `python -m finetuning.app` in a real browser: ask, stop, go on, click a wrong row; nothing hostile runs, ten bad files.

For an environment with gradio (make test-app); skipped without it, without Chromium (Debian: apt-get install chromium) or playwright.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import made_run
import pytest
import recipe
import saved
import tiny
import torch
from bad_uploads import BAD_UPLOADS
from hostile_texts import ATTACKS

from benchmarks.screenshots import browser_path
from finetuning.data.shown import escape
from phi3v import Phi3VForCausalLM

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
if browser_path() is None:
    pytest.skip("no Chromium here", allow_module_level=True)

QUESTION = "What is it?"
HOSTILE_NAME = "<img src=x onerror=window.hurt=1>"


def environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in recipe.LAUNCHER}
    return {
        **kept,
        "PYTHONPATH": str(recipe.ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
        # A proxy that nothing answers at: whoever asked it would fail.
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }


def run_folder(folder: Path, data: Path) -> Path:
    """A whole model with the report of a run, all of whose answers are wrong; every second row is hostile."""
    recipe.docvqa_rows(data, train=0, test=6)
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows[::2]):
        row["id"], row["query"]["en"], row["answers"] = ATTACKS[number], f"{ATTACKS[number]} ?", [ATTACKS[number]]
    recipe.write_jsonl(data / "rows.jsonl", rows)
    recipe.model_folder(folder)
    # Never the likeliest: an answer goes on until it is stopped, or as long as it may be.
    model = Phi3VForCausalLM.from_pretrained(folder, trust_remote_code=False)
    with torch.no_grad():
        model.lm_head.weight[model.config.stop_token_ids] = 0
    model.save_pretrained(folder)
    found = [
        {
            "id": row["id"],
            "question": f"{row['query']['en']}\nAnswer briefly.",
            "references": row["answers"],
            "images": [str(data / row["image"])],
        }
        for row in rows
    ]
    command = ["torchrun", "finetune_hf_trainer_docvqa.py", "--data_dir", str(data)]
    made_run.leave(folder, found, {"before": "x", "after": f"no {ATTACKS[2]}"}, attempt={"command": command})
    made_run.report(folder, found)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "script": "finetune_hf_trainer_docvqa.py"}))
    return folder


class Server:
    """The command as a process of its own, and what it serves."""

    def __init__(self, folder: Path):
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.run = run_folder(folder / "run", folder / "data")
        self.hostile = saved.adapter_folder(self.run, folder / HOSTILE_NAME, scale=0.2)
        command = [sys.executable, "-m", "finetuning.app", str(self.run), str(self.hostile), "--max_new_tokens", "12"]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(self.temporary),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            pytest.fail("".join(self.lines))
        self.url = f"http://127.0.0.1:{self.port}"
        # What it says later must not fill the pipe.
        threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True).start()

    def status(self, path: str, method: str = "GET", body: str | None = None, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        found = Server(folder)
    yield found
    if found.process.poll() is None:
        found.process.kill()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, server):
    """A page in which every error and every request is noted."""
    contexts = []

    def open_one(width=1280, **settings):
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.faults, page.requests = [], []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(server.url)
        page.locator("#box textarea").wait_for()
        return page

    yield open_one
    for context in contexts:
        context.close()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "page.png"
    tiny.picture(60, 40).save(path)
    return path


def put(page, *paths: Path) -> None:
    page.locator("#box input[type=file]").set_input_files([str(path) for path in paths])
    playwright.expect(page.locator("#box .thumbnail-item, #box .thumbnail-small")).to_have_count(
        len(paths), timeout=20_000
    )


def ask(page, question: str) -> None:
    page.locator("#box textarea").fill(question)
    page.locator("#box textarea").press("Enter")


def answers(page, turns: int) -> list[list[str]]:
    """The answers of each column, once there are so many."""
    playwright.expect(page.locator(".answered small")).to_have_count(2 * turns, timeout=60_000)
    texts = page.locator(".answered > p").all_text_contents()
    return [texts[:turns], texts[turns:]]


def say(page) -> str:
    """The line below the conversations, once there is one."""
    page.locator("#line p").wait_for(timeout=30_000)
    return page.locator("#line p").inner_text()


def printed(text: str) -> str:
    """An answer as a terminal gets it."""
    return "\n".join(escape(line) for line in text.split("\n"))


def asked(folder: Path, *words: str) -> str:
    """What finetuning.ask prints."""
    command = [sys.executable, "-m", "finetuning.ask", str(folder), *words, "--max_new_tokens", "12"]
    found = subprocess.run(
        command, env=environment(folder), cwd=recipe.ROOT, capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def test_upload_and_ask_gives_what_the_command_ask_gives(open_page, server, picture):
    page = open_page()
    put(page, picture)
    ask(page, QUESTION)
    found = answers(page, 1)
    for column, folder in zip(found, (server.run, server.hostile), strict=True):
        assert printed(column[0]) == asked(folder, "--image", str(picture), QUESTION)
    assert found[0] != found[1]
    page.wait_for_function(
        "document.querySelectorAll('.asked img').length === 2 && [...document.querySelectorAll('.asked img')].every((i) => i.naturalWidth)"
    )
    # a second turn, and an empty beginning after it
    ask(page, "And now?")
    assert [column[0] for column in answers(page, 2)] == [column[0] for column in found]
    page.locator("#new").click()
    playwright.expect(page.locator(".asked")).to_have_count(0)
    ask(page, "And now?")
    assert answers(page, 1)[0][0] != ""
    assert page.faults == []
    assert [url for url in page.requests if not url.startswith((server.url, "data:", "blob:"))] == []


def test_an_answer_streams_and_stop_ends_it(open_page):
    page = open_page()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("number input for Longest answer, in tokens").fill("1500")
    page.keyboard.press("Tab")
    ask(page, QUESTION)
    live = page.locator(".turns").first.locator(".waiting p")
    live.wait_for()
    page.wait_for_function("document.querySelector('.waiting p')?.textContent.length > 0")
    first = live.text_content()
    page.wait_for_function(
        "(length) => document.querySelector('.waiting p')?.textContent.length > length", arg=len(first)
    )
    assert live.text_content().startswith(first)
    page.locator("#stop").click()
    playwright.expect(page.locator(".waiting")).to_have_count(0)
    # the second model was not asked any more
    assert page.locator(".answered small").all_text_contents()[0].endswith(", stopped")
    playwright.expect(page.locator(".asked")).to_have_count(1)
    playwright.expect(page.locator("#stop")).to_be_disabled()


def test_a_wrong_row_is_asked_again_by_a_click_and_by_keys(open_page, server):
    page = open_page()
    rows = page.locator(".rows button")
    assert rows.count() == 6
    number = next(
        place
        for place in range(6)
        if "Which page" in rows.nth(place).inner_text() or "number on" in rows.nth(place).inner_text()
    )
    rows.nth(number).focus()
    page.keyboard.press("Enter")
    assert "expected: " in say(page)
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    playwright.expect(page.locator("#box textarea")).to_have_value(re.compile("Answer briefly"))
    question = page.locator("#box textarea").input_value()
    page.keyboard.press("Enter")
    found = answers(page, 1)
    row = next(
        row
        for row in map(json.loads, (server.run.parent / "data" / "rows.jsonl").read_text().splitlines())
        if say_id(rows.nth(number), row)
    )
    picture = server.run.parent / "data" / row["image"]
    assert printed(found[0][0]) == asked(server.run, "--image", str(picture), question)


def say_id(button, row: dict) -> bool:
    return f"expected: {' or '.join(row['answers'])}" in button.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_scrolls_in_one_direction_only(open_page, picture, scheme):
    page = open_page(390, color_scheme=scheme)
    put(page, picture)
    ask(page, "x" * 300)
    answers(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colour)[:3])) > 380) == (scheme == "light")


def test_nothing_hostile_runs_or_loads(open_page, server, tmp_path):
    page = open_page()
    # the name of a folder, of an uploaded file, rows of a run, questions
    name = tmp_path / "<img src=x onerror=window.hurt=1>'\"&.png"
    tiny.picture(60, 40).save(name)
    put(page, name)
    for number, attack in enumerate(ATTACKS):
        ask(page, attack)
        answers(page, number + 1)
    shown = page.locator(".turns").first.locator(".asked > p").all_text_contents()
    assert shown == ATTACKS
    assert page.locator("h2").last.text_content() == HOSTILE_NAME
    for number in range(6):
        page.locator(".rows button").nth(number).click()
        playwright.expect(page.locator("#box textarea")).to_have_value(re.compile("Answer briefly"))
        assert "answered: " in say(page)
    page.wait_for_timeout(300)
    assert page.evaluate("window.hurt") is None
    assert (
        page.locator(".turns script, .turns iframe, .turns a, .turns style, .turns svg, .rows svg, img[src=x]").count()
        == 0
    )
    assert page.locator("#box").is_visible()
    assert [url for url in page.requests if not url.startswith((server.url, "data:", "blob:"))] == []
    assert page.faults == []


def test_bad_files_get_one_line_each_and_the_next_question_is_answered(open_page, tmp_path, picture):
    page = open_page()
    for name, (write, says) in BAD_UPLOADS.items():
        write(tmp_path / name)
        put(page, tmp_path / name)
        ask(page, f"{QUESTION} {name}")
        page.locator("#line p", has_text=name).wait_for(timeout=30_000)
        line = say(page)
        assert line.startswith(f"{name}: "), line
        assert says in line
        assert "/" not in line
        page.locator("#new").click()
        playwright.expect(page.locator("#line p")).to_have_count(0)
    assert page.locator(".asked").count() == 0
    # too large for the server, and of no kind that is taken: they do not even get into the box
    for name, content in (("large.png", bytes(21_000_000)), ("tool.exe", b"MZ"), ("drawing.svg", b"<svg/>")):
        (tmp_path / name).write_bytes(content)
        page.locator("#box input[type=file]").set_input_files(str(tmp_path / name))
        page.wait_for_timeout(1500)
        assert page.locator("#box .thumbnail-item, #box .thumbnail-small").count() == 0, name
    put(page, picture)
    ask(page, "")
    assert say(page).startswith("question: expected text")
    ask(page, QUESTION)
    assert all(column for column in answers(page, 1))
    assert page.evaluate("window.hurt") is None


def test_no_file_but_an_uploaded_one_is_served_and_no_url_is_fetched(server):
    for path in ("/etc/passwd", "README.md", str(server.run / "config.json"), f"{server.temporary}/../run/config.json"):
        assert server.status(f"/gradio_api/file={path}")[0] == 404, path
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(1)
        url = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/x.png"
        assert server.status(f"/gradio_api/file={url}")[0] == 404
        # in a file's place
        config = json.loads(server.status("/config")[1])
        event = next(item for item in config["dependencies"] if len(item["inputs"]) == 5)
        for given in (url, "https://example.invalid/x.png", "/etc/passwd", str(server.run / "config.json")):
            file = {"path": given, "url": given, "meta": {"_type": "gradio.FileData"}}
            value = {"text": QUESTION, "files": [file]}
            body = {"data": [value, None, 0, 12, "as trained"], "fn_index": event["id"], "session_hash": "abc"}
            assert server.status("/gradio_api/queue/join", "POST", json.dumps(body))[0] == 200
            assert '"success":false' in server.status("/gradio_api/queue/data?session_hash=abc")[1].replace(" ", "")
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    assert server.status("/", Host="evil.example")[0] == 404


def test_only_this_machine_reaches_it(server):
    own = [item[4][0] for item in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    others = [address for address in own if not address.startswith("127.")] or ["127.0.0.2"]
    for address in others:
        with pytest.raises(OSError), socket.create_connection((address, server.port), timeout=5):  # noqa: PT011
            pass


def test_uploads_are_private_and_go_with_the_process(server):
    """Last: it ends the server."""
    (folder,) = server.temporary.glob("phi3v-app-*")
    assert folder.stat().st_mode & 0o077 == 0
    assert any(folder.rglob("*.png"))
    server.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 30
    while server.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.process.returncode == 0, server.lines
    assert not folder.exists()
    # Of a file that was not uploaded gradio prints where it refused it; nothing of this repository failed.
    assert not any("/finetuning/" in line for line in server.lines), server.lines
