"""Takes the README's pictures of the demo's report, as a browser shows it: docs/images/report-light.png and report-dark.png.

    python demo.py demo_output
    python -m benchmarks.readme_pictures demo_output/full/report.html

Score and loss beside three answers: the first two of three digits that are right, and the first that is wrong. Needs what
benchmarks.screenshots needs.
"""

import argparse
import sys
from pathlib import Path

from .record import ROOT
from .screenshots import browser_path

IMAGES = ROOT / "docs" / "images"
WIDTH, SCALE = 1180, 1.25  # CSS pixels; pixels of the picture for each
MOST_BYTES = 300_000
# Two columns, so that a reader sees all of it at once.
STYLE = """
main { display: grid; grid-template-columns: 9fr 11fr; grid-template-rows: auto auto 1fr; gap: 0 16px; padding: 20px 24px !important }
main > *, .facts, .charts > :not(:first-child), .bar, #pages, .keys, .left-out { display: none !important }
header { display: block !important; grid-column: 1 / 3 }
h1 { font-size: 21px !important; white-space: nowrap }
.summary { display: block !important; grid-column: 1 }
.charts { display: flex !important; grid-column: 1 }
.charts > * { flex: 1 }
#answers { display: flex !important; flex-direction: column; grid-column: 2; grid-row: 2 / 4; margin-top: 16px !important }
#rows { display: flex; flex-direction: column; gap: 12px; flex: 1 }
.row { grid-template-columns: 136px 1fr !important; flex: 1; margin: 0 !important; padding: 12px 18px !important }
.question { white-space: normal !important }
.pictures button { min-height: 0 !important }
"""
CHOOSE = """() => {
    const rows = [...document.querySelectorAll("#rows .row")]
    const answers = row => [...row.querySelectorAll(".answers tr")]
    const right = row => answers(row).at(-1).querySelector(".good") && answers(row)[0].cells[1].textContent.length == 3
    const wrong = row => answers(row).at(-1).querySelector(".bad")
    const kept = [...rows.filter(right).slice(0, 2), ...rows.filter(wrong).slice(0, 1)]
    document.getElementById("rows").replaceChildren(...kept)
}"""


def take(report: Path, folder: Path) -> list[Path]:
    """Writes a picture of each colour scheme and returns their paths.

    Args:
        report (Path): report.html of a run.
        folder (Path): is created; pictures of the same names are replaced.
    """
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            # The page's own policy would keep the style out.
            context = browser.new_context(
                viewport={"width": WIDTH, "height": 600},
                color_scheme=scheme,
                device_scale_factor=SCALE,
                bypass_csp=True,
            )
            page = context.new_page()
            page.goto(report.absolute().as_uri())
            page.locator("#order").select_option("data")
            page.evaluate(CHOOSE)
            page.add_style_tag(content=STYLE)
            page.wait_for_timeout(400)  # until the pictures are decoded
            written.append(folder / f"report-{scheme}.png")
            page.locator("main").screenshot(path=written[-1])
            context.close()
        browser.close()
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.html of the demo's full run")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder for the pictures")
    args = parser.parse_args()
    if browser_path() is None:
        print("error: expected a browser (chromium), found none", file=sys.stderr)
        return 2
    for path in take(args.report, args.out):
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
        if path.stat().st_size > MOST_BYTES:
            print(f"error: {path}: expected at most {MOST_BYTES:,} bytes; lower SCALE", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
