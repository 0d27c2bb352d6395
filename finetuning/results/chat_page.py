"""The page that `python -m finetuning.app` serves: conversations side by side, a box to ask in, rows that were answered wrongly."""

import html
import threading
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..data.shown import printable
from ..errors import InputError
from .examples import Example, copy_picture
from .side_by_side import Answering, Said, SideBySide
from .talk import line_html, talk_html
from .thumbnails import thumbnail
from .uploads import TAKEN, first_pictures, shown_pictures, without_folders

STYLE = Path(__file__).parent / "templates" / "app.css"
THUMBNAIL = 8_000  # bytes; the whole conversation is sent with each new turn
AS_TRAINED = "as trained"
# A click on a button inside tells which one it was.
CLICKS = """
element.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-number]");
    if (!button) return;
    trigger("click", { number: Number(button.dataset.number) });
    document.querySelector("#box textarea").focus();
});
"""


def take_uploads_only(box: gr.MultimodalTextbox) -> None:
    """Keeps gradio from fetching a URL for whoever writes one in a file's place."""
    move = box.async_move_resource_to_block_cache

    async def move_uploaded(url_or_file_path):
        if "://" in str(url_or_file_path):
            raise gr.Error("expected an uploaded file, found a URL", print_exception=False)
        return await move(url_or_file_path)

    # Not in a class of its own: gradio would look for that one's part in the browser.
    box.async_move_resource_to_block_cache = move_uploaded


class Page:
    """Builds the page and answers what is clicked.

    Args:
        models (SideBySide): who answers.
        titles (Sequence[tuple[str, str]]): name of each model, and in a few words what it is.
        examples (Sequence[Example]): rows that were answered wrongly, to ask again.
        how (Answering): what the settings begin with.
        uploads (Path): gradio's folder of uploaded files, in which copies of the examples' pictures are put too.
    """

    def __init__(
        self,
        models: SideBySide,
        titles: Sequence[tuple[str, str]],
        examples: Sequence[Example],
        how: Answering,
        uploads: Path,
    ):
        self.models, self.titles, self.examples, self.how = models, titles, list(examples), how
        self.uploads = uploads
        self._stops: dict[str, threading.Event] = defaultdict(threading.Event)

    def build(self) -> gr.Blocks:
        """The page's parts and what happens when they are used."""
        count = len(self.titles)
        with gr.Blocks(title="Phi-3.5-vision", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
            gr.HTML("<h1>Ask about pictures</h1>", js_on_load=None)
            talks = gr.State([[] for _ in range(count)], time_to_live=86400)
            with gr.Row(elem_id="talks"):
                columns = [self._column(name, what) for name, what in self.titles]
            line = gr.HTML("", elem_id="line", js_on_load=None)
            box = gr.MultimodalTextbox(
                show_label=False,
                label="Question",
                placeholder="Ask a question; drop, paste or choose pictures or a clip",
                file_count="multiple",
                file_types=list(TAKEN),
                max_plain_text_length=100_000,
                autofocus=True,
                elem_id="box",
            )
            take_uploads_only(box)
            with gr.Row(elem_id="buttons"):
                stop = gr.Button("Stop", interactive=False, elem_id="stop")
                new = gr.Button("New conversation", elem_id="new")
            with gr.Accordion("Settings", open=False, elem_id="settings"):
                temperature = gr.Slider(
                    0, 2, self.how.temperature, step=0.1, label="Temperature (0: always the likeliest word)"
                )
                length = gr.Slider(1, 2048, self.how.max_new_tokens, step=1, label="Longest answer, in tokens")
                crops = gr.Dropdown(
                    [AS_TRAINED, *map(str, range(1, 17))], value=AS_TRAINED, label="Most crops of a picture"
                )
            settings = [temperature, length, crops]
            outputs = [box, line, talks, stop, *columns]
            # One at a time for all of them, whoever asks; the others wait in line.
            shared: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
            at_once: dict[str, Any] = {"queue": False, "api_visibility": "private"}
            box.submit(self._ask, [box, talks, *settings], outputs, show_progress_on=[line], **shared)
            stop.click(self._stop, None, None, **at_once)
            new.click(self._stop, None, None, **at_once).then(
                self._begin, None, outputs, show_progress="hidden", **shared
            )
            if self.examples:
                with gr.Accordion("Rows that were answered wrongly", open=True, elem_id="examples"):
                    gr.HTML("<p>A click puts a row's question and pictures into the box.</p>", js_on_load=None)
                    rows = gr.HTML(examples_html(self.examples), js_on_load=CLICKS)
                rows.click(self._stop, None, None, **at_once)
                rows.click(self._show_example, None, outputs, show_progress="hidden", **shared)
            page.unload(self._leave)
        return page

    def _column(self, name: str, what: str) -> gr.HTML:
        with gr.Column(min_width=280, elem_classes="talk"):
            gr.HTML(f"<h2>{html.escape(name)}</h2><small>{html.escape(what)}</small>", js_on_load=None)
            return gr.HTML(talk_html([]), elem_classes="turns", autoscroll=True, max_height=520, js_on_load=None)

    def _ask(
        self, value: dict[str, Any], talks: list[list[Said]], temperature, length, crops, request: gr.Request
    ) -> Iterator[tuple]:
        """Asks all models; the page is drawn again with every few words."""
        question, files = (value or {}).get("text") or "", (value or {}).get("files") or []
        how = Answering(float(temperature), int(length), None if crops == AS_TRAINED else int(crops))
        stopped = self._stops[request.session_hash or ""]
        stopped.clear()
        shown: list[str] = [talk_html(said) for said in talks]
        try:
            if not question.strip():
                raise InputError("question: expected text, found none; write what you want to know about the picture")
            pictures = shown_pictures(files)
            thumbnails = [thumbnail(picture, THUMBNAIL) for picture in first_pictures(pictures)]
        except InputError as error:
            yield gr.skip(), line_html(str(error), "error"), talks, gr.skip(), *shown
            return
        faults = []
        for number, said in enumerate(talks):
            waiting = [talk_html(talks[later], (question, thumbnails, "")) for later in range(number, len(talks))]
            shown[number:] = waiting
            yield gr.update(value=None), "", talks, gr.update(interactive=True), *shown
            try:
                for found in self.models.ask(
                    number, [item.turn for item in said], question, pictures, how, stopped.is_set
                ):
                    if isinstance(found, str):
                        shown[number] = talk_html(said, (question, thumbnails, found))
                        yield (*[gr.skip()] * 4, *shown)
                    else:
                        turn, reply = found
                        note = f"{reply.speed}, stopped" if stopped.is_set() else reply.speed
                        said.append(Said(turn, reply.text, note, thumbnails))
            except Exception as error:
                faults.append(f"{self.titles[number][0]}: {one_line(error, files)}")
            shown[number] = talk_html(said)
            if stopped.is_set():
                shown[number + 1 :] = [talk_html(later) for later in talks[number + 1 :]]
                break
        yield gr.skip(), line_html("; ".join(faults), "error"), talks, gr.update(interactive=False), *shown

    def _stop(self, request: gr.Request) -> None:
        self._stops[request.session_hash or ""].set()

    def _leave(self, request: gr.Request) -> None:
        """The page was closed: nobody waits for the answer."""
        if stop := self._stops.pop(request.session_hash or "", None):
            stop.set()

    def _begin(self, value: Any = None, line: str = "", earlier: Sequence[Said] = ()) -> tuple:
        """An empty conversation with every model, or one that begins with some turns."""
        talks = [list(earlier) for _ in self.titles]
        return gr.update(value=value), line, talks, gr.update(interactive=False), *map(talk_html, talks)

    def _show_example(self, event: gr.EventData) -> tuple:
        """A new conversation with an example's earlier turns, its question and pictures in the box."""
        number = event.number
        if not isinstance(number, int) or not 0 <= number < len(self.examples):
            raise gr.Error("expected a row of the list", print_exception=False)
        example = self.examples[number]
        earlier = [Said(turn, turn.answers[0], "as the run was shown it") for turn in example.earlier]
        for said in earlier:
            said.thumbnails = [thumbnail(source, THUMBNAIL) for source in first_pictures(said.turn.images)]
        answers = [f"{run} answered: {answer or '(empty answer)'}" for run, answer in example.answers.items()]
        note = f"{example.id}: expected: {' or '.join(example.turn.answers)}; {'; '.join(answers)}"
        files = [
            str(copy_picture(source, self.uploads / f"{number}-{place}"))
            for place, source in enumerate(first_pictures(example.turn.images))
        ]
        return self._begin({"text": example.turn.user, "files": files}, line_html(note, "note"), earlier)


def one_line(error: Exception, files: Sequence[str]) -> str:
    """An error as the page shows it; of one that is no fault of the question, the terminal gets the rest."""
    if not isinstance(error, InputError):
        traceback.print_exception(error)
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return without_folders(printable(first, 400), files)


def examples_html(examples: Sequence[Example]) -> str:
    """A list of buttons, one for each row."""
    buttons = []
    for number, item in enumerate(examples):
        picture = f'<img src="{html.escape(item.thumbnail)}" alt="">' if item.thumbnail else ""
        answers = [f"{run}: {answer or '(empty answer)'}" for run, answer in item.answers.items()]
        texts = (item.turn.user, f"expected: {' or '.join(item.turn.answers)}", *answers)
        lines = "".join(f'<span dir="auto">{html.escape(printable(text))}</span>' for text in texts)
        buttons.append(f'<button type="button" data-number="{number}">{picture}{lines}</button>')
    return f'<div class="rows">{"".join(buttons)}</div>'
