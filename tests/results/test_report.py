"""What a person looks at after a run: every text is escaped, every run has a report, finished or not."""

import html
import json
import re
import signal
from html.parser import HTMLParser
from types import SimpleNamespace

import made_run
import pytest
import recipe
from made_run import LOGS, leave, report, rows, to_conversation
from PIL import Image

from finetuning.data.conversation import Conversation
from finetuning.data.dataset import ConversationDataset
from finetuning.errors import RunError, Stopped
from finetuning.results.classes import count_answers
from finetuning.results.metrics import anls, exact_match
from finetuning.results.page import read_data
from finetuning.results.plots import plot_confusion, plot_curves
from finetuning.results.report import report_at_end, write_report
from finetuning.results.rows import LEFT_OUT, UNREADABLE, stage_order
from finetuning.training.identity import read_run, write_run

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7 * 7 }} & </table>"


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


def write(folder, rows, before: bool = True, logs=LOGS, title="DocVQA", text="table", **settings):
    """The report of a run that answered `rows`: {"id", "question", "references", "answer", "images"}."""
    answers = {"before": "?"} if before else {}
    leave(folder, rows, {**answers, "after": lambda turn: turn["answer"]}, logs, summary=text)
    return report(folder, rows, title, **settings)


def data_of(folder):
    return read_data(folder / "report.html")


# ---- nothing of the data runs


def test_hostile_texts_stay_text(tmp_path):
    hostile = rows(1, id=HOSTILE, question=HOSTILE, references=[HOSTILE, HOSTILE], answer=HOSTILE)
    page = Page(write(tmp_path, hostile, title=HOSTILE, text=HOSTILE))
    data = data_of(tmp_path)
    harmless = Page(write(tmp_path, rows(1, references=["0", "0"])))
    assert page.tags == harmless.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    # and they can be read: title twice, description
    assert "".join(page.texts).count("<script>alert(1)</script>") == 3
    assert "{{ 7 * 7 }}" in "".join(page.texts)
    (row,) = data["rows"]
    (turn,) = row["turns"]
    assert [row["id"], turn["question"], *turn["references"], turn["answers"][-1]] == [HOSTILE] * 5


@pytest.mark.parametrize("text", ["</script><script>alert(1)</script>", "<!--<script>", "]]>", "{% raw %}"])
def test_no_text_ends_the_script_that_holds_the_data(tmp_path, text):
    page = Page(write(tmp_path, rows(1, answer=text, question=text)))
    assert page.tags == Page(write(tmp_path, rows(1))).tags


def test_hostile_figures_classes_settings_and_ends_stay_text(tmp_path):
    def score(_):
        figure = HOSTILE.replace("/", "")
        return {figure: 0.5, f"{figure}2": 0.25} | {f"{figure}/{name}": 1.0 for name in (HOSTILE, "other one")}

    found = rows(2)
    found[0]["references"], found[1]["references"] = [HOSTILE], ["other one"]
    attempt = {name: HOSTILE for name in ("commit", "device", "strategy", "model", "data", "ending")}
    attempt |= {"command": [HOSTILE], "state": "failed", "changed": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    leave(tmp_path, found, {"before": HOSTILE, "after": HOSTILE}, attempt=attempt)
    page = Page(report(tmp_path, found, score=score))
    assert page.tags.count("script") == 2
    assert page.tags.count("img") == 1  # of the dialog
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert data_of(tmp_path)["classes"] == [HOSTILE, "other one"]


def test_only_the_script_of_this_package_may_run(tmp_path):
    page = Page(write(tmp_path, rows(1)))
    (policy,) = [value for name, value in page.attributes if name == "content" and "default-src" in value]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert all(re.fullmatch(r"'sha256-[\w+/=]{44}'", rules[name]) for name in ("script-src", "style-src"))


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    write(tmp_path, rows(1, question="a\ud800b"))
    assert data_of(tmp_path)["rows"][0]["turns"][0]["question"] == "a?b"


@pytest.mark.parametrize("character", ["\u2028", "\u0085"], ids=ascii)
def test_unusual_line_ends_in_an_answer_break_nothing(tmp_path, character):
    # Written as they are into predictions.jsonl; str.splitlines would take them for line ends.
    assert f"a{character}b" in write(tmp_path, rows(1, answer=f"a{character}b"))


def test_pictures_are_drawn_here_and_nothing_is_fetched(tmp_path):
    page = Page(write(tmp_path, rows(2)))
    assert [value for name, value in page.attributes if name in ("src", "action", "srcset")] == []
    assert [value for name, value in page.attributes if name == "href"] == ["#answers"]
    pictures = data_of(tmp_path)["pictures"]
    assert len(pictures) == 2
    assert all(re.match(r"data:image/(png|jpeg|webp);base64,", source) for source in pictures)


# ---- the first screen


def test_the_report_shows_figures_and_answers_before_and_after(tmp_path):
    text = html.unescape(write(tmp_path, rows(2)))
    assert re.search(r'class="from">0\.000</span>.*<span>0\.500</span>', text)
    data = data_of(tmp_path)
    assert data["columns"] == ["before", "after"]
    # r0 expects 0 and gets 0, r1 expects 1 and gets 0; both were "?" before
    turns = {row["id"]: row["turns"][0] for row in data["rows"]}
    assert (turns["r0"]["answers"], turns["r0"]["scores"]) == (["?", "0"], [0, 1])
    assert (turns["r1"]["answers"], turns["r1"]["scores"]) == (["?", "0"], [0, 0])


def test_the_first_screen_says_how_the_run_was_made(tmp_path):
    text = html.unescape(write(tmp_path, rows(2)))
    for said in (
        "torchrun --nproc_per_node=2 finetune",
        "0123456789abcdef",
        "2.13.0",
        "LoRA",
        "use_lora",
        "1.00 GiB",
        "12 s",
    ):
        assert said in text, said
    assert "8 samples/s" in text


def test_the_score_has_an_interval(tmp_path):
    text = html.unescape(write(tmp_path, rows(100)))
    low, high = map(float, re.findall(r"<dt>after</dt><dd>(\S+) – (\S+), 100 answers", text)[0])
    assert 0.35 < low < 0.45 < 0.55 < high < 0.65
    assert "+0.500 (+0." in text


def test_it_works_without_a_first_evaluation(tmp_path):
    text = write(tmp_path, rows(2), before=False)
    assert "0.500" in text
    assert "<dt>before</dt>" not in text
    assert [item["key"] for item in data_of(tmp_path)["filters"]] == ["all", "wrong"]


def test_it_works_without_rows_and_without_logs(tmp_path):
    text = write(tmp_path, [], logs=[])
    assert "no answers were scored" in text
    assert not (tmp_path / "curves.png").exists()


def test_it_works_without_anything_that_a_run_leaves(tmp_path):
    assert "no answers were scored" in report(tmp_path, rows(2))
    assert [row["score"] for row in data_of(tmp_path)["rows"]] == [None, None]


def test_a_score_that_fails_on_what_there_is_leaves_the_answers(tmp_path):
    def score(_):
        raise ZeroDivisionError

    write(tmp_path, rows(2), score=score)
    # by exact match
    assert sorted(row["score"] for row in data_of(tmp_path)["rows"]) == [0, 1]


def test_other_ranks_write_nothing(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), process_index=1)
    write_report(args, "x", ConversationDataset([], None, None, []), made_run.score)
    assert not list(tmp_path.iterdir())


def test_the_first_line_of_a_docstring_is_the_title(tmp_path):
    assert "<title>First.</title>" in write(tmp_path, rows(1), title="First.\n\nMore.")


# ---- rows


def test_rows_stand_worst_first_and_those_that_training_made_worse_before_others(tmp_path):
    found = rows(6)
    before = {"r3": "3", "r4": "4"}  # right before; r3 is wrong after
    leave(
        tmp_path,
        found,
        {
            "before": lambda turn: before.get(f"r{turn['references'][0]}", "?"),
            "after": lambda turn: turn["answer"],
        },
    )
    report(tmp_path, found)
    data = data_of(tmp_path)
    assert [row["id"] for row in data["rows"]] == ["r3", "r1", "r5", "r0", "r2", "r4"]
    flags = {row["id"]: row["flags"] for row in data["rows"]}
    assert flags["r3"] == ["wrong", "changed", "worse"]
    assert flags["r1"] == ["wrong", "changed"]
    assert flags["r4"] == []
    counts = {item["key"]: item["count"] for item in data["filters"]}
    assert counts == {"all": 6, "wrong": 3, "changed": 5, "better": 2, "worse": 1}


def test_every_row_is_listed_or_said_to_be_left_out(tmp_path):
    text = write(tmp_path, rows(120))
    assert len(data_of(tmp_path)["rows"]) == 120
    assert "--report_rows" not in text
    text = report(tmp_path, rows(120), report_rows=7)
    data = data_of(tmp_path)
    assert {row["score"] for row in data["rows"]} == {0}
    assert len(data["rows"]) == 7
    assert "The 7 worst of 120 rows are listed; --report_rows 120 lists all." in text
    # what the comparison of runs counts is all of them
    assert len(data["run"]["sums"]) == 120


def test_rows_that_share_an_id_keep_their_own_answers(tmp_path):
    shared = rows(1, answer="first answer") + rows(1, answer="second answer")
    page = write(tmp_path, shared)
    assert page.index("first answer") < page.index("second answer")


def test_stages_stand_in_order_and_may_hold_some_of_the_rows(tmp_path):
    found = rows(4)
    leave(
        tmp_path,
        found,
        {
            "after": "c",
            "step 100": lambda turn: "b" if turn["references"] != ["3"] else None,
            "step 20": "",
            "before": "a",
        },
    )
    text = report(tmp_path, found)
    data = data_of(tmp_path)
    assert data["columns"] == ["before", "step 20", "step 100", "after"]
    answers = {row["id"]: row["turns"][0]["answers"] for row in data["rows"]}
    assert answers["r0"] == ["a", "", "b", "c"]
    assert answers["r3"] == ["a", "", None, "c"]
    assert "while it trained 3 answers, before and after 4" in text
    assert sorted(["after", "step 9", "x", "step 10", "before"], key=stage_order) == [
        *("before", "step 9", "step 10", "x", "after"),
    ]


def test_evaluations_while_training_are_drawn(tmp_path):
    logs = [*LOGS, {"eval_loss": 1.5, "eval_accuracy": 0.25, "step": 2}]
    text = write(tmp_path, rows(2), logs=logs)
    assert re.search(r"</i>evaluation</li>", text)
    charts = data_of(tmp_path)["charts"]
    assert ["evaluation", [[2, 1.5]]] in charts[0]["lines"]
    assert ["while it trained", [[2, 0.25]]] in charts[1]["lines"]
    assert [2, 0.25] in data_of(tmp_path)["run"]["score_by_step"]


def test_the_turns_of_a_row_stay_together(tmp_path):
    row = {"id": "r", "turns": [*rows(2, images=[]), {"question": "And?", "references": ["x"], "answer": "x"}]}
    write(tmp_path, [row])
    (found,) = data_of(tmp_path)["rows"]
    assert [turn["scores"] for turn in found["turns"]] == [[0, 1], [0, 0], [0, 1]]
    assert found["score"] == pytest.approx(2 / 3, abs=1e-3)


@pytest.mark.parametrize(
    ("answer", "references"),
    [
        *(("Yes", ["Yes."]), ("yes.", ["Yes."]), (" Yes. ", ["yes"]), ("No", ["Yes."]), ("", ["Yes."])),
        *(("b", ["a", "B."]), ("Yes, it is", ["Yes"])),
    ],
)
def test_an_answer_is_green_where_the_score_counts_it_as_right(tmp_path, answer, references):
    write(tmp_path, rows(1, answer=answer, references=references))
    (row,) = data_of(tmp_path)["rows"]
    assert row["turns"][0]["scores"][-1] == exact_match(answer, references)


def test_an_answer_has_the_score_of_its_task(tmp_path):
    def score(predictions):
        return {"anls": sum(anls(item.answer, item.references) for item in predictions) / len(predictions)}

    write(tmp_path, rows(1, answer="abcd", references=["abce"]), score=score)
    assert data_of(tmp_path)["rows"][0]["turns"][0]["scores"] == [0, 0.75]
    assert data_of(tmp_path)["run"]["scored_by"] == "anls"


def test_an_image_of_any_mode_is_shown(tmp_path):
    images = [recipe.page("x").convert(mode) for mode in ("L", "1", "RGBA", "P", "CMYK")]
    write(tmp_path, rows(1, images=images))
    assert len(data_of(tmp_path)["pictures"]) == 5
    assert [image.size for image in images] == [(60, 40)] * 5


def test_a_picture_that_is_gone_is_said_so(tmp_path):
    write(tmp_path, rows(1, images=[str(tmp_path / "gone.png"), recipe.page("x")]))
    (row,) = data_of(tmp_path)["rows"]
    assert row["pictures"] == [UNREADABLE, 0]


def test_the_page_keeps_within_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr("finetuning.results.report.MOST_BYTES", 60_000)
    # one for all, so that none fits where one before it did not
    noisy = [Image.effect_noise((300, 300), 80)] * 60
    found = [{**row, "images": [image]} for row, image in zip(rows(60), noisy, strict=True)]
    text = write(tmp_path, found)
    data = data_of(tmp_path)
    assert len(json.dumps([data["rows"], data["pictures"]])) < 60_000 < len(text)
    # worst first, so that those have their pictures
    shown = [row["pictures"] != [LEFT_OUT] for row in data["rows"]]
    assert shown == sorted(shown, reverse=True)
    assert any(shown)


# ---- curves and classes


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


@pytest.mark.parametrize("values", [(float("nan"), 1.0), (float("inf"), float("inf")), (1e30, -1e30), (0.0, 0.0)])
def test_a_loss_of_any_value_is_drawn_or_left_out(tmp_path, values):
    logs = [{"loss": value, "step": step, "learning_rate": 0.0} for step, value in enumerate(values)]
    text = write(tmp_path, rows(1), logs=logs)
    assert "nan" not in re.findall(r"<svg.*?</svg>", text, re.DOTALL)[0].lower()


def test_a_long_run_keeps_its_spikes(tmp_path):
    logs = [{"loss": 9.0 if step == 7777 else 1.0, "step": step} for step in range(20_000)]
    text = write(tmp_path, rows(1), logs=logs)
    (points,) = [points for name, points in data_of(tmp_path)["charts"][0]["lines"] if name == "training, smoothed"]
    assert len(points) <= 1000
    assert len(text) < 300_000
    assert ">10<" in text or ">9<" in text  # the axis reaches the spike


def test_the_confusion_matrix_counts_as_the_score_does():
    classes = ["No.", "Yes."]
    counts = count_answers(classes, [["Yes."], ["Yes."], ["No."]], ["Yes", "maybe", "no."])
    assert counts == [[1, 0, 0], [0, 1, 1]]
    figure = plot_confusion(classes, counts)
    drawn = [[int(text.get_text()) for text in figure.axes[0].texts][at : at + 3] for at in (0, 3)]
    assert drawn == counts
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["No.", "Yes.", "other"]


def test_open_answers_have_no_confusion_matrix(tmp_path):
    # nine receipts and their companies
    found = rows(9)
    text = write(tmp_path, found)
    assert not (tmp_path / "confusion.png").exists()
    assert "Accuracy by class" not in text
    assert data_of(tmp_path)["classes"] == []


def closed_rows():
    return [
        {**row, "references": [("Yes.", "No.")[number % 2]], "turns": [{**row, "choices": ["No.", "Yes."]}]}
        for number, row in enumerate(rows(8))
    ]


def test_choices_close_the_classes_and_give_a_roc_curve(tmp_path):
    found = closed_rows()
    for row in found:
        row["turns"][0]["references"] = row["references"]
    chances = {"No.": -1.0, "Yes.": -0.5}
    leave(tmp_path, found, {"after": ("Yes", chances)})
    text = report(tmp_path, found)
    data = data_of(tmp_path)
    assert data["classes"] == ["No.", "Yes."]
    assert "Accuracy by class" in text
    assert "ROC curve" in text
    assert (tmp_path / "confusion.png").exists()
    wrong = next(row for row in data["rows"] if row["score"] == 0)
    assert (wrong["turns"][0]["class"], wrong["turns"][0]["answered"]) == (0, 1)
    assert wrong["turns"][0]["chances"] == ["No. 38%, Yes. 62%"]


def test_figures_of_classes_close_them_unless_a_reference_is_none_of_them(tmp_path):
    def score(_):
        return {"accuracy": 1.0, "accuracy/0": 1.0, "accuracy/1": 1.0}

    write(tmp_path, rows(2), score=score)
    assert data_of(tmp_path)["classes"] == ["0", "1"]
    write(tmp_path, rows(3), score=score)
    assert data_of(tmp_path)["classes"] == []


def test_many_classes_are_a_picture_of_coloured_cells(tmp_path):
    def score(predictions):
        return {"accuracy": 0.5, **{f"accuracy/{item.references[0]}": 0.5 for item in predictions}}

    text = write(tmp_path, rows(30), score=score)
    assert 'aria-label="confusion matrix"' in text
    assert "data-cell" not in text.partition("<script>")[0]


# ---- runs that end in other ways


class FakeTrainer:
    """What `report_at_end` asks of a Trainer."""

    def __init__(self, folder, rank: int = 0):
        device = SimpleNamespace(type="cpu")
        self.args = SimpleNamespace(
            output_dir=str(folder), process_index=rank, device=device, world_size=2, report_rows=50, strategy="full",
            model_name_or_path="m", data_dir=None, data_paths=[], changed={"seed": 3},
        )  # fmt: skip
        self.train_dataset = ConversationDataset([0] * 5, to_conversation, None, [1] * 5)
        self.state = SimpleNamespace(log_history=LOGS[:2], global_step=2)


@pytest.fixture
def signals():
    saved = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, saved)


def run_block(folder, error=None, rank=0, score=made_run.score):
    """A run in a `with` block that leaves answers and ends with `error`; what came out of the block."""
    found = rows(2)
    dataset = ConversationDataset(found, to_conversation, None, [9] * len(found))
    if rank == 0:
        leave(folder, found, {"before": "?"}, logs=[])
        write_run(folder, {**made_run.RECORD, "summary": "table"})
    try:
        with report_at_end(FakeTrainer(folder, rank), "A task.\n\nMore.", dataset, score):
            if error:
                raise error
    except BaseException as caught:
        return caught
    return None


def test_a_finished_run_says_so(tmp_path):
    assert run_block(tmp_path) is None
    text = (tmp_path / "report.html").read_text()
    assert '<span class="pill finished">' in text
    (attempt,) = read_run(tmp_path)["attempts"]
    assert attempt["state"] == "finished"
    assert attempt["changed"] == {"seed": "3"}
    assert attempt["train_rows"] == 5


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (Stopped(signal.SIGTERM, "checkpoint-2 is written to x"), "stopped", "stopped by SIGTERM: checkpoint-2"),
        (KeyboardInterrupt(), "stopped", "stopped by SIGINT"),
        (RunError("step 3: the loss of r1 is not finite"), "failed", "step 3: the loss of r1 is not finite"),
        (ValueError("first line\n\nlast <b>line"), "failed", "first line ... last <b>line"),
        (SystemExit(3), "failed", "3"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_run_that_ends_otherwise_has_a_report_that_says_how(tmp_path, error, state, said):
    assert run_block(tmp_path, error) is error
    text = html.unescape((tmp_path / "report.html").read_text())
    assert f'<span class="pill {state}">' in text
    assert f"At step 2: {said}" in text
    # with the losses that the Trainer had logged and no file holds
    assert "training loss" in text or "loss by optimizer step" in text
    assert data_of(tmp_path)["columns"] == ["before"]


@pytest.mark.usefixtures("signals")
def test_a_report_that_fails_hides_no_error_of_the_run(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("finetuning.results.report.write_page", fail)
    error = RunError("the run's own")
    assert run_block(tmp_path, error) is error
    assert "the report could not be written: no space left" in capsys.readouterr().out
    # but of a run that went well it is an error
    assert isinstance(run_block(tmp_path), OSError)


def test_another_rank_writes_nothing_when_it_fails(tmp_path):
    error = RunError("x")
    assert run_block(tmp_path, error, rank=1) is error
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("signals")
def test_starts_add_up(tmp_path):
    run_block(tmp_path, RunError("x"))
    first = read_run(tmp_path)
    dataset = ConversationDataset([], to_conversation, None, [])
    with report_at_end(FakeTrainer(tmp_path), "x", dataset, made_run.score):
        pass
    attempts = read_run(tmp_path)["attempts"]
    assert [attempt["state"] for attempt in attempts] == ["failed", "finished"]
    assert attempts[0] == first["attempts"][0]
    assert "in 2 starts" in (tmp_path / "report.html").read_text()


def test_a_run_that_was_killed_is_called_unfinished(tmp_path):
    found = rows(1)
    leave(tmp_path, found, {"before": "?"})
    record = read_run(tmp_path)
    for name in ("state", "ending", "seconds", "step", "peak_bytes"):
        del record["attempts"][0][name]
    write_run(tmp_path, record)
    assert '<span class="pill unfinished">' in report(tmp_path, found)


def test_the_logs_of_a_checkpoint_are_taken_where_the_run_left_none(tmp_path):
    found = rows(1)
    leave(tmp_path, found, {"before": "?"}, logs=[])
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(json.dumps({"log_history": LOGS}))
    assert "loss by optimizer step" in report(tmp_path, found)


def test_a_conversation_is_read_again_for_its_pictures_only(tmp_path):
    # Pictures of thousands of rows must not be held all at once.
    calls = []

    def counted(row) -> Conversation:
        calls.append(row["id"])
        return to_conversation(row)

    found = rows(3)
    leave(tmp_path, found, {"after": "1"})
    args = SimpleNamespace(output_dir=str(tmp_path), process_index=0, report_rows=2)
    write_report(args, "x", ConversationDataset(found, counted, None, [9] * 3), made_run.score)
    assert sorted(calls) == ["r0", "r0", "r1", "r2", "r2"]


def test_a_script_without_a_docstring_has_its_name_as_title(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["some/where/my_task.py"])
    assert "<h1>my_task.py</h1>" in write(tmp_path, rows(1), title=None)
