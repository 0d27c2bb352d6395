"""The page over several runs: differences over the rows that all answered, rows where they disagree, bad calls in one line."""

import html
import re

import pytest
from made_run import leave, report, rows

from finetuning.compare import main
from finetuning.results.metrics import anls
from finetuning.results.page import read_data


@pytest.fixture
def runs(tmp_path):
    """name -> answers to r0, r1, ...; a run of a name with its report."""

    def make(name: str, answers: list[str], found=None, **settings):
        folder = tmp_path / name
        folder.mkdir()
        found = found or rows(len(answers))
        given = dict(zip([row["references"][0] for row in found], answers, strict=True))
        leave(folder, found, {"before": "?", "after": lambda turn: given[turn["references"][0]]}, **settings)
        report(folder, found)
        return str(folder)

    return make


def compared(tmp_path, *paths):
    out = tmp_path / "compare.html"
    assert main([*paths, "--out", str(out)]) == 0
    return html.unescape(out.read_text(encoding="utf-8")), read_data(out)


def test_two_runs_lie_side_by_side(tmp_path, runs, capsys):
    first, second = runs("full", ["0", "1", "x", "x"]), runs("lora", ["0", "1", "2", "x"])
    text, data = compared(tmp_path, first, second)
    assert "comparison -> " in capsys.readouterr().out
    assert data["columns"] == ["full", "lora"]
    # r2 is where they disagree, r3 is wrong in both
    assert [row["id"] for row in data["rows"]] == ["r2", "r3", "r0", "r1"]
    assert data["rows"][0]["turns"][0]["answers"] == ["x", "2"]
    assert {item["key"]: item["count"] for item in data["filters"]} == {"all": 4, "disagree": 1, "any": 2, "every": 1}
    assert "+0.250" in text
    assert [line[0] for line in data["charts"][0]["lines"]] == ["full", "lora"]


def test_the_difference_is_over_the_rows_that_all_answered(tmp_path, runs):
    # r0 and r1 are common: 1 of 2 against 2 of 2
    first = runs("a", ["0", "x"])
    second = runs("b", ["0", "1", "x", "x", "x", "x"])
    text, data = compared(tmp_path, first, second)
    assert len(data["rows"]) == 2
    assert "over the 2 rows that all runs answered" in text
    assert "+0.500" in text


def test_the_paired_interval_shows_a_sure_difference(tmp_path, runs):
    right = [str(number) for number in range(60)]
    text, _ = compared(tmp_path, runs("a", ["x"] * 30 + right[30:]), runs("b", right))
    (interval,) = re.findall(r"<td>\+0\.500<small>\+(0\.\d+) to \+(0\.\d+)</small>", text)
    assert 0.3 < float(interval[0]) < 0.5 < float(interval[1]) < 0.7


def test_a_report_that_somebody_sent_is_a_run_too(tmp_path, runs):
    first, second = runs("a", ["0", "1"]), runs("b", ["0", "x"])
    _, data = compared(tmp_path, f"{first}/report.html", second)
    assert data["columns"] == ["a", "b"]


def test_runs_of_one_name_are_told_apart(tmp_path, runs):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    first, second = runs("x/full", ["0"]), runs("y/full", ["0"])
    _, data = compared(tmp_path, first, second)
    assert data["columns"] == [first, second]


def test_only_settings_that_differ_are_shown(tmp_path, runs):
    first = runs("a", ["0"], attempt={"changed": {"learning_rate": "0.1", "seed": "7"}})
    second = runs("b", ["0"], attempt={"changed": {"seed": "7"}})
    text, _ = compared(tmp_path, first, second)
    assert re.search(r'<th scope="row">learning_rate</th><td>0\.1</td><td>default</td>', text)
    assert "seed" not in text


def refusal(capsys, *flags) -> str:
    assert main([*flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bad_calls_are_one_line(tmp_path, runs, capsys):
    run, out = runs("a", ["0"]), str(tmp_path / "o.html")
    assert "expected 2 to 6 runs, found 1" in refusal(capsys, run)
    assert "expected 2 to 6 runs, found 7" in refusal(capsys, *[run] * 7)
    assert "/gone/report.html: expected the page that a run writes" in refusal(capsys, run, f"{tmp_path}/gone")
    (tmp_path / "x.html").write_text("<p>no report")
    assert "found another file" in refusal(capsys, run, f"{tmp_path}/x.html")
    assert "--out" in refusal(capsys, run, run, "--out", f"{tmp_path}/no/such/folder.html")
    other = runs("b", ["5"], rows(6)[5:])
    assert "found no row that all of them have" in refusal(capsys, run, other, "--out", out)
    empty = tmp_path / "empty"
    empty.mkdir()
    report(empty, [])
    assert "expected a run with answers, found none" in refusal(capsys, run, str(empty))


def test_runs_scored_otherwise_are_refused(tmp_path, runs, capsys):
    run, found = runs("a", ["0"]), rows(1)
    other = tmp_path / "b"
    other.mkdir()
    leave(other, found, {"after": "0"})
    report(
        other,
        found,
        score=lambda items: {"anls": sum(anls(item.answer, item.references) for item in items) / len(items)},
    )
    assert "found accuracy in the first, anls in b" in refusal(capsys, run, str(other))
