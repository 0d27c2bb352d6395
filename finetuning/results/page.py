"""A page as one HTML file that needs no network: its template, style sheet, script and data; texts of others never run."""

import base64
import hashlib
import re
from json import loads
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def write_page(path: Path, template: str, **values: Any) -> None:
    """Renders a template of `templates/` and puts it into place whole.

    Every text is escaped. A Content-Security-Policy lets the browser run this package's own script and style sheet, known by
    their digests, and nothing else; the data stand as JSON without a `<`.

    Args:
        path (Path): the HTML file.
        template (str): report.html or compare.html.
        values: what the template shows; `data` is for the script, see `rows.py`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    html = environment.get_template(template).render(
        values,
        style=Markup(style),
        script=Markup(script),
        style_hash=_digest(style),
        script_hash=_digest(script),
    )
    aside = path.with_name(f"{path.name}.part")
    # Half a surrogate pair, which no file can hold, may stand in a name of a file.
    aside.write_text(html, encoding="utf-8", errors="replace")
    aside.replace(path)


def read_data(path: Path) -> dict[str, Any] | None:
    """The data of a page that `write_page` has written; None for any other file."""
    try:
        found = DATA.search(path.read_text(encoding="utf-8"))
        return loads(found[1]) if found else None
    except (OSError, ValueError):
        return None


def _digest(text: str) -> Markup:
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
