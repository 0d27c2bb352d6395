"""Pictures of the report and of the comparison page, as a browser shows them: wide and narrow, light and dark.

    python -m benchmarks.screenshots demo_output/full/report.html pictures
    python -m benchmarks.screenshots demo_output/full/report.html pictures --compare demo_output/compare.html

Writes report-1280-light.png and so on, with the first screen, a list of wrong answers and a large picture. Needs Chromium
(Debian: apt-get install chromium) and playwright (requirements-dev.txt).
"""

import argparse
import shutil
import sys
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {1280: 900, 390: 844}  # pixels


def browser_path() -> str | None:
    """The browser of this machine; None if there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def take(pages: dict[str, Path], folder: Path) -> list[Path]:
    """Writes the pictures of each page and returns their paths.

    Args:
        pages (dict[str, Path]): name of the pictures -> HTML file.
        folder (Path): is created.
    """
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        for width, height in SIZES.items():
            for scheme in ("light", "dark"):
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
                for name, path in pages.items():
                    page = context.new_page()
                    written += _take_one(page, path, folder / f"{name}-{width}-{scheme}")
                    page.close()
                context.close()
        browser.close()
    return written


def _take_one(page, path: Path, target: Path) -> list[Path]:
    """The first screen, the answers of the first filter after "all", and the first picture, large."""
    written = [target.with_name(f"{target.name}{end}.png") for end in ("", "-answers", "-picture")]
    page.goto(path.absolute().as_uri())
    page.screenshot(path=written[0])
    page.locator("[data-filter]").nth(1).click()
    page.evaluate("document.getElementById('answers').scrollIntoView()")
    page.wait_for_timeout(400)  # until the pictures are decoded
    page.screenshot(path=written[1])
    if not page.locator("#rows .pictures button").count():
        return written[:2]
    page.locator("#rows .pictures button").first.click()
    page.wait_for_timeout(200)
    page.screenshot(path=written[2])
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.html of a run")
    parser.add_argument("out_dir", type=Path, help="folder for the pictures")
    parser.add_argument("--compare", type=Path, help="a page of finetuning.compare")
    args = parser.parse_args()
    if browser_path() is None:
        print(f"error: expected a browser ({', '.join(BROWSERS)}), found none", file=sys.stderr)
        return 2
    pages = {"report": args.report} | ({"compare": args.compare} if args.compare else {})
    for path in take(pages, args.out_dir):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
