"""Pictures of a run for a folder or a slide: curves.png and, for closed classes, confusion.png."""

from matplotlib.figure import Figure

from .classes import OTHER


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
