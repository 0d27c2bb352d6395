"""What a person looks at after a run: every text is escaped, and a run without a first evaluation has a report too."""

import html
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import recipe
from PIL import Image

from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import ConversationDataset
from finetuning.results.metrics import exact_match
from finetuning.results.report import MAX_ROWS, plot_confusion, plot_curves, write_report
from finetuning.training.identity import write_run

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7 * 7 }} & </table>"
LOGS = [
    {"loss": 3.0 - step / 2, "grad_norm": 1.0, "learning_rate": 1e-3 / step, "step": step, "epoch": step / 4}
    for step in (1, 2, 3, 4)
] + [{"train_runtime": 1.0, "step": 4}]


class Page(HTMLParser):
    """Tags, attributes and texts of a page, as a browser would find them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.texts.append(data)


def write(folder, rows, before: bool = True, logs=LOGS, answer=lambda row: row["answer"], title="DocVQA", text="table"):
    """The report of a run that answered `rows`: {"id", "question", "references", "answer", "images"}."""
    stages = ("before", "after") if before else ("after",)
    for stage in stages:
        figures = {
            "anls": 0.25 if stage == "before" else 0.75,
            "num_answers": len(rows),
            "ids": [row["id"] for row in rows],
            "answers_unique": [row["references"] for row in rows],
            "generated_texts_unique": [row["answer"] for row in rows],
        }
        (folder / f"eval_{stage}.json").write_text(json.dumps(figures))
    predictions = [
        {
            **{"stage": stage, "model": "x", "id": row["id"], "turn": 0, "choices": {}, "asked": "x"},
            "answer": answer(row) if stage == "after" else "?",
        }
        for stage in stages
        for row in rows
    ]
    recipe.write_jsonl(folder / "predictions.jsonl", predictions)

    def to_conversation(row):
        return Conversation(row["id"], [Turn(row["question"], row["references"], row["images"])])

    if logs:
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    record = {"script": "x.py", "settings": {}, "spread": {}, "rows": {}, "started": "", "summary": text}
    write_run(folder, record)
    args = SimpleNamespace(output_dir=str(folder), process_index=0)
    write_report(args, title, ConversationDataset(rows, to_conversation, None, [9] * len(rows)))
    return (folder / "report.html").read_text(encoding="utf-8")


def rows(count: int = 2, **changes) -> list[dict]:
    return [
        {
            "id": f"r{number}",
            "question": "Which page?",
            "references": [str(number)],
            "answer": str(number % 2),
            "images": [recipe.page(str(number))],
            **changes,
        }
        for number in range(count)
    ]


def test_hostile_texts_stay_text(tmp_path):
    hostile = rows(1, id=HOSTILE, question=HOSTILE, references=[HOSTILE, HOSTILE], answer=HOSTILE)
    page = Page(write(tmp_path, hostile, title=HOSTILE, text=HOSTILE))
    harmless = Page(write(tmp_path, rows(1, references=["0", "0"])))
    assert page.tags == harmless.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    # and they can be read: title twice, description, id, question, references, answer
    assert "".join(page.texts).count("<script>alert(1)</script>") == 8
    assert "{{ 7 * 7 }}" in "".join(page.texts)


@pytest.mark.parametrize("character", ["\u2028", "\u0085"], ids=ascii)
def test_unusual_line_ends_in_an_answer_break_nothing(tmp_path, character):
    # Written as they are into predictions.jsonl; str.splitlines would take them for line ends.
    assert f"a{character}b" in write(tmp_path, rows(1, answer=f"a{character}b"))


def test_pictures_are_drawn_here_and_nothing_is_fetched(tmp_path):
    page = Page(write(tmp_path, rows(2)))
    sources = [value for name, value in page.attributes if name in ("src", "href", "action", "srcset")]
    assert len(sources) >= 3  # curves, and a page for each row
    assert all(re.match(r"data:image/(png|jpeg);base64,", source) for source in sources)


def test_the_report_shows_figures_and_answers_before_and_after(tmp_path):
    text = html.unescape(write(tmp_path, rows(2)))
    assert "<tr><td>anls<td>0.2500<td>0.7500" in text
    assert "Predictions (2 of 2)" in text
    # r0 expects 0 and gets 0, r1 expects 1 and gets 1; both were "?" before
    assert text.count('<td class="good">') == 2
    assert text.count('<td class="bad">?') == 2


def test_it_works_without_a_first_evaluation(tmp_path):
    text = write(tmp_path, rows(2), before=False)
    assert "0.7500" in text
    assert '<td class="muted">before<' not in text


def test_it_works_without_rows_and_without_logs(tmp_path):
    text = write(tmp_path, [], logs=[])
    assert "Predictions (0 of 0)" in text
    assert not (tmp_path / "curves.png").exists()


def test_curves_are_a_picture(tmp_path):
    write(tmp_path, rows(1))
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 200


def test_curves_show_loss_norm_and_rate_by_step():
    figure = plot_curves(LOGS)
    drawn = [line.get_xydata().tolist() for axis in figure.axes for line in axis.lines]
    steps = [entry for entry in LOGS if "loss" in entry]
    assert drawn == [[[entry["step"], entry[key]] for entry in steps] for key in ("loss", "grad_norm", "learning_rate")]
    assert plot_curves([{"train_runtime": 1.0, "step": 4}]) is None


def test_curves_do_not_need_every_key():
    # one step without a gradient norm
    assert plot_curves([{"loss": 1.0, "step": 1}, {"loss": 0.5, "grad_norm": 1.0, "learning_rate": 0.1, "step": 2}])


@pytest.mark.parametrize("keys", [("loss", "step"), ("loss", "step", "learning_rate")])
def test_curves_of_a_run_that_never_logged_a_gradient_norm(keys):
    assert plot_curves([{key: 1.0 for key in keys}])


def test_rows_that_share_an_id_keep_their_own_answers(tmp_path):
    shared = rows(1, answer="first answer") + rows(1, answer="second answer")
    page = write(tmp_path, shared)
    assert page.index("first answer") < page.index("second answer")


def test_a_long_evaluation_shows_its_first_rows(tmp_path):
    text = write(tmp_path, rows(MAX_ROWS + 3))
    assert f"Predictions ({MAX_ROWS} of {MAX_ROWS + 3})" in text


def test_an_image_of_any_mode_is_shown(tmp_path):
    images = [recipe.page("x").convert(mode) for mode in ("L", "1", "RGBA", "P", "CMYK")]
    assert write(tmp_path, rows(1, images=images)).count("data:image/jpeg") == 5


@pytest.mark.parametrize(
    ("answer", "references"),
    [
        *(("Yes", ["Yes."]), ("yes.", ["Yes."]), (" Yes. ", ["yes"]), ("No", ["Yes."]), ("", ["Yes."])),
        *(("b", ["a", "B."]), ("Yes, it is", ["Yes"])),
    ],
)
def test_an_answer_is_green_where_the_score_counts_it_as_right(tmp_path, answer, references):
    text = write(tmp_path, rows(1, answer=answer, references=references))
    (colour,) = re.findall(r'<td class="muted">after<td class="(\w+)">', text)
    assert colour == ("good" if exact_match(answer, references) else "bad")


def test_the_confusion_matrix_counts_as_the_score_does():
    figure = plot_confusion([["Yes."], ["Yes."], ["No."]], ["Yes", "maybe", "no."])
    counts = [[int(text.get_text()) for text in figure.axes[0].texts][at : at + 3] for at in (0, 3)]
    # classes No., Yes., other
    assert counts == [[1, 0, 0], [0, 1, 1]]
    assert plot_confusion([["a", "b"], ["c"]], ["a", "c"]) is None


def test_other_ranks_write_nothing(tmp_path):
    write_report(
        SimpleNamespace(output_dir=str(tmp_path), process_index=1), "x", ConversationDataset([], None, None, [])
    )
    assert not list(tmp_path.iterdir())


def test_the_first_line_of_a_docstring_is_the_title(tmp_path):
    assert "<title>First.</title>" in write(tmp_path, rows(1), title="First.\n\nMore.")
