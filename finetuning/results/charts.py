"""Charts as inline SVG: lines over steps, intervals side by side, ROC curves, matrices; the page's style sheet colours them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 560, 226
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 38
MOST_POINTS = 500  # of a line: more than a screen has columns to tell apart
POINTS_TO_SMOOTH = 8
SMOOTHED_OVER = 12  # a smoothed loss looks back over about this share of the run: a twelfth
COLOURS = 6


@dataclass
class Line:
    """A line of a chart.

    Args:
        name (str): for the legend.
        points (list): (x, y), or (x, y, low, high) with the interval of y.
        colour (int): 0 to 5, of the page's palette.
        style (str): "" for a plain line, or of "faint", "dashed", "dots" and "alone" (dots without a line)
            those that hold, with spaces between.
    """

    name: str
    points: list[tuple[float, ...]]
    colour: int = 0
    style: str = ""


@dataclass
class Chart:
    """A drawn chart: its SVG, the lines for its legend, and what the page's script needs to name a point."""

    svg: Markup
    lines: list[Line]
    data: dict[str, Any] = field(default_factory=dict)


def finite(points: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """The points whose numbers can be drawn."""
    return [point for point in points if all(math.isfinite(value) for value in point)]


def smooth(points: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Exponential moving average of a line, without a pull towards its start; empty for a line of a few points."""
    if len(points) < POINTS_TO_SMOOTH:
        return []
    keep = 1 - 2 / (max(2, len(points) / SMOOTHED_OVER) + 1)
    total = weight = 0.0
    found: list[tuple[float, ...]] = []
    for x, y, *_ in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        found.append((x, total / weight))
    return found


def thin(points: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """A long line by the lowest and highest point of each stretch, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    size, found = math.ceil(len(points) / (MOST_POINTS // 2)), []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {part.index(min(part, key=lambda point: point[1])), part.index(max(part, key=lambda point: point[1]))}
        found += [part[number] for number in sorted(ends)]
    return found


def line_chart(title: str, lines: list[Line], bounds: tuple[float, float] | None = None, unit: str = "step") -> Chart:
    """Lines over the optimizer steps.

    Args:
        title (str): said to those who cannot see it.
        lines (list[Line]): at least one with a point.
        bounds (tuple, optional): lowest and highest value; else those of the points.
        unit (str): of the x axis; steps begin at 0.
    """
    lines = [Line(line.name, thin(finite(line.points)), line.colour, line.style) for line in lines]
    lines = [line for line in lines if line.points]
    xs = [point[0] for line in lines for point in line.points] + [0]
    ys = [value for line in lines for point in line.points for value in point[1:]]
    x_axis = _Axis(xs, LEFT, WIDTH - RIGHT, whole=unit == "step")
    y_axis = _Axis(list(bounds) if bounds else ys, HEIGHT - BOTTOM, TOP)
    parts = [_frame(x_axis, y_axis, unit)]
    for line in lines:
        places = [(x_axis.place(point[0]), y_axis.place(point[1])) for point in line.points]
        classes = f"line c{line.colour} {line.style}"
        if "alone" not in line.style.split() and len(places) > 1:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            parts.append(Markup('<path class="{}" d="{}"/>').format(classes, path))
        for (x, y), point in zip(places, line.points, strict=True):
            if len(point) == 4:
                low, high = y_axis.place(point[2]), y_axis.place(point[3])
                parts.append(
                    Markup('<path class="whisker c{}" d="M{x} {}V{}M{} {low}h8M{} {high}h8"/>').format(
                        line.colour, f"{low:.1f}", f"{high:.1f}", f"{x - 4:.1f}", f"{x - 4:.1f}",
                        x=f"{x:.1f}", low=f"{low:.1f}", high=f"{high:.1f}",
                    )
                )  # fmt: skip
            if "dots" in line.style.split() or len(places) == 1:
                parts.append(Markup('<circle class="dot c{}" cx="{}" cy="{}" r="4"/>').format(
                    line.colour, f"{x:.1f}", f"{y:.1f}"))  # fmt: skip
    parts.append(Markup('<line class="cursor" y1="{}" y2="{}" visibility="hidden"/>').format(TOP, HEIGHT - BOTTOM))
    data = {
        "unit": unit,
        "x": [x_axis.low, x_axis.high, LEFT, WIDTH - RIGHT],
        "lines": [[line.name, [list(point) for point in line.points]] for line in lines if "faint" not in line.style],
    }
    return Chart(_svg(title, HEIGHT, parts), lines, data)


def _svg(title: str, height: float, parts: list[Markup]) -> Markup:
    body = Markup("").join(parts)
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(WIDTH, height, title, body)


class _Axis:
    """Values -> places, with ticks at round numbers."""

    def __init__(self, values: list[float], start: float, end: float, whole: bool = False):
        low, high = min(values), max(values)
        if low == high:
            low, high = (low - 1, high + 1) if whole else (low - abs(low or 1) / 2, high + abs(high or 1) / 2)
        locator = MaxNLocator(nbins=5, integer=whole, steps=[1, 2, 2.5, 5, 10])
        ticks = [float(tick) for tick in locator.tick_values(low, high)]
        if not whole:
            # Values end at round numbers; steps where the run does.
            low, high = min(low, ticks[0]), max(high, ticks[-1])
        self.low, self.high, self.start, self.end = low, high, start, end
        self.ticks = [tick for tick in ticks if low <= tick <= high]

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _frame(x_axis: _Axis, y_axis: _Axis, unit: str) -> Markup:
    parts = []
    for tick in y_axis.ticks:
        y = f"{y_axis.place(tick):.1f}"
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(LEFT, WIDTH - RIGHT, y=y))
        parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="end" dy=".35em">{}</text>').format(
            LEFT - 8, y, short(tick)))  # fmt: skip
    for tick in x_axis.ticks:
        parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            f"{x_axis.place(tick):.1f}", HEIGHT - BOTTOM + 18, short(tick)))  # fmt: skip
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        middle, HEIGHT - 3, unit))  # fmt: skip
    return Markup("").join(parts)


def short(value: float) -> str:
    """A number as an axis shows it."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e")
    return f"{value:.4g}"


def matrix_chart(title: str, classes: list[str], counts: list[list[int]]) -> Markup:
    """A large confusion matrix as coloured cells, each named when pointed at; rows are expected, columns answered."""
    size = WIDTH / (len(classes) + 1)
    parts = [Markup('<rect class="plane" width="{}" height="{}"/>').format(WIDTH, f"{size * len(classes):.1f}")]
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            if count:
                level, answered = heat(count, sum(row)), [*classes, "anything else"][x]
                parts.append(
                    Markup('<rect class="heat{} {}" x="{}" y="{}" width="{s}" height="{s}"><title>{}</title></rect>').format(
                        level, "right" if x == y else "wrong", f"{x * size:.1f}", f"{y * size:.1f}",
                        f"expected {classes[y]}, answered {answered}: {count}", s=f"{size:.1f}",
                    )
                )  # fmt: skip
    return _svg(title, size * len(classes), parts)


def heat(count: int, total: int) -> int:
    """0 to 5: how dark the cell of a count is."""
    return math.ceil(5 * count / total) if count else 0


def roc_chart(curves: dict[str, list[tuple[float, float]]]) -> Chart:
    """ROC curves: stage -> (false positive rate, true positive rate)."""
    chance = Line("chance", [(0, 0), (1, 1)], COLOURS - 1, "faint dashed")
    lines = [Line(name, [*points], number) for number, (name, points) in enumerate(curves.items())]
    return line_chart("ROC curve", [chance, *lines], (0, 1), "false positive rate")
