"""Pictures of a run for a folder or a slide: curves.png and, for closed classes, confusion.png."""

from matplotlib.figure import Figure

from .metrics import exact_match

OTHER = "other"


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


def count_answers(classes: list[str], references: list[list[str]], answers: list[str]) -> list[list[int]]:
    """How often each class is answered for each class.

    Args:
        classes (list[str]): the closed classes.
        references (list[list[str]]): acceptable answers to each question.
        answers (list[str]): the answer to each question.

    Returns:
        list[list[int]]: a row for each expected class, a column for each answered one and a last one for anything else.
    """
    counts = [[0] * (len(classes) + 1) for _ in classes]
    for expected, answer in zip(references, answers, strict=True):
        row = find_class(classes, expected)
        if row is not None:
            column = find_class(classes, [answer])
            counts[row][len(classes) if column is None else column] += 1
    return counts


def find_class(classes: list[str], texts: list[str]) -> int | None:
    """Number of the class that one of the texts names as the scores compare: "Yes" is "Yes."."""
    return next((number for number, name in enumerate(classes) if exact_match(name, texts)), None)


def plot_confusion(classes: list[str], counts: list[list[int]]) -> Figure:
    """The confusion matrix of `count_answers`."""
    columns = [*classes, OTHER]
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
