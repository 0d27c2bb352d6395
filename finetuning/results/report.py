"""What a person looks at after a run: the loss curve, and a page with the predictions."""

import base64
import io
import json
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from ..arguments import RecipeArguments
from ..data.dataset import ConversationDataset
from ..data.images import load_images
from ..training.identity import read_run
from .metrics import exact_match
from .predictions import read_predictions

MAX_ROWS = 50
THUMBNAIL = 480  # pixels
MAX_CLASSES = 120

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
 h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
 table { border-collapse: collapse } td, th { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top }
 table.figures td { font-variant-numeric: tabular-nums }
 .row { display: flex; gap: 1.2rem; padding: 1rem 0; border-top: 1px solid #d8dee4 }
 .row > div { flex: 1 } .images { flex: 0 0 16rem !important } .images img { max-width: 100%; border: 1px solid #d8dee4 }
 .good { color: #1a7f37 } .bad { color: #c0362c } .muted { color: #656d76 }
 img.curve { max-width: 100% }
 pre { white-space: pre-wrap; background: #f6f8fa; padding: .8rem }
</style>
<h1>{{ title }}</h1>
<table class="figures">
<tr><th><th>before<th>after
{% for name, before, after in figures %}<tr><td>{{ name }}<td>{{ before }}<td>{{ after }}
{% endfor %}</table>
<pre>{{ description }}</pre>
{% if curve %}<img class="curve" alt="training loss" src="{{ curve }}">{% endif %}
{% if confusion %}<h2>Answers after training by class</h2><img alt="confusion matrix" src="{{ confusion }}">{% endif %}
<h2>Predictions ({{ rows | length }} of {{ total }})</h2>
{% for row in rows %}<div class="row">
<div class="images">{% for image in row.images %}<img alt="" src="{{ image }}">{% endfor %}</div>
<div><div class="muted">{{ row.id }}</div><b>{{ row.question }}</b>
<table>
<tr><td class="muted">expected<td>{{ row.references | join(" / ") }}
{% if row.before is not none %}<tr><td class="muted">before<td class="{{ row.before_class }}">{{ row.before }}{% endif %}
<tr><td class="muted">after<td class="{{ row.after_class }}">{{ row.after }}
</table></div>
</div>
{% endfor %}
</html>
"""


def plot_curves(log_history: list[dict[str, float]]) -> Figure | None:
    """Loss, learning rate and gradient norm over the optimizer steps; None if nothing was logged."""
    logs = [entry for entry in log_history if "loss" in entry]
    if not logs:
        return None
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, key, title in zip(
        axes, ("loss", "grad_norm", "learning_rate"), ("training loss", "gradient norm", "learning rate"), strict=True
    ):
        points = [(entry["step"], entry[key]) for entry in logs if key in entry]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
    return figure


def plot_confusion(references: list[list[str]], answers: list[str]) -> Figure | None:
    """How often each class is answered for each class; None unless every question has one of a few expected answers."""
    classes = sorted({options[0] for options in references})
    if any(len(options) > 1 for options in references) or not 2 <= len(classes) <= MAX_CLASSES:
        return None
    columns = [*classes, "other"]
    counts = [[0] * len(columns) for _ in classes]
    for (expected,), answer in zip(references, answers, strict=True):
        found = next((name for name in classes if exact_match(answer, [name])), "other")
        counts[classes.index(expected)][columns.index(found)] += 1
    side = 2.5 + 0.45 * len(columns)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(counts, cmap="Blues")
    axis.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor", parse_math=False)
    axis.set_yticks(range(len(classes)), classes, parse_math=False)
    axis.set(xlabel="answered", ylabel="expected")
    highest = max(max(row) for row in counts)
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            axis.text(x, y, str(count), ha="center", va="center", color="white" if count > highest / 2 else "black")
    return figure


def write_report(args: RecipeArguments, title: str, dataset: ConversationDataset) -> None:
    """Writes curves.png, report.html and, for a few classes, confusion.png into the output folder, from what the run has left there.

    Every text is escaped, and the page holds only pictures that are drawn here. The first rank alone writes.

    Args:
        args (RecipeArguments): for the output folder.
        title (str): heading of the page; of a longer text its first line.
        dataset (ConversationDataset): the rows that were answered.
    """
    if args.process_index:
        return
    folder, title = Path(args.output_dir), title.splitlines()[0]
    description = (read_run(folder) or {}).get("summary", "")
    state = folder / "trainer_state.json"
    log_history = json.loads(state.read_text(encoding="utf-8"))["log_history"] if state.exists() else []
    figure = plot_curves(log_history)
    if figure:
        figure.savefig(folder / "curves.png", dpi=120)
    confusion = None
    results = {}
    for stage in ("before", "after"):
        path = folder / f"eval_{stage}.json"
        results[stage] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    names = [name for name, value in results["after"].items() if isinstance(value, (int, float))]
    if results["after"]:
        confusion = plot_confusion(results["after"]["answers_unique"], results["after"]["generated_texts_unique"])
    if confusion:
        confusion.savefig(folder / "confusion.png", dpi=120)
    # In the data set's order: ids need not be unique.
    predictions = read_predictions(folder / "predictions.jsonl")
    answers = {
        stage: iter([item["answer"] for item in predictions if item["stage"] == stage]) for stage in ("before", "after")
    }
    shown = []
    for row in islice(dataset.rows, MAX_ROWS):
        conversation = dataset.to_conversation(row)
        for turn, asked in enumerate(conversation.turns):
            item: dict[str, Any] = {
                "id": conversation.id,
                "question": asked.user,
                "references": asked.answers,
                "images": [],
            }
            if turn == 0:
                item["images"] = [_thumbnail(image) for image in load_images(conversation)]
            for stage in ("before", "after"):
                item[stage] = next(answers[stage], None)
                item[f"{stage}_class"] = "good" if _matches(item[stage], asked.answers) else "bad"
            shown.append(item)
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    html = page.render(
        title=title,
        description=description,
        figures=[(name, _figure(results["before"].get(name)), _figure(results["after"].get(name))) for name in names],
        curve=_data_uri(folder / "curves.png") if figure else None,
        confusion=_data_uri(folder / "confusion.png") if confusion else None,
        rows=shown,
        total=results["after"].get("num_answers", 0),
    )
    aside = folder / "report.html.part"
    aside.write_text(html, encoding="utf-8")
    aside.replace(folder / "report.html")
    print(f"report -> {folder / 'report.html'}", flush=True)


def _matches(answer: str | None, references: list[str]) -> bool:
    # As the tasks' own scores compare: "Yes" is right where "Yes." is expected.
    return answer is not None and exact_match(answer, references)


def _figure(value) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _thumbnail(image) -> str:
    image = image.convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
