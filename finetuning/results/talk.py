"""A conversation as HTML: texts are text, whatever they look like, and every picture lies in the page itself."""

from collections.abc import Sequence
from html import escape

from .side_by_side import Said


def talk_html(said: Sequence[Said], pending: tuple[str, Sequence[str], str] | None = None) -> str:
    """The turns of a conversation, the oldest first.

    Args:
        said (Sequence[Said]): answered turns.
        pending (tuple, optional): a question that is being answered, data URIs of its pictures, the answer so far. It stands at
            the very end with its elements left open, so that a longer answer only appends to the text that is sent.
    """
    if not said and pending is None:
        return '<p class="nothing">Nothing was asked yet.</p>'
    parts = [_asked(item.turn.user, item.thumbnails) + _answered(item) for item in said]
    if pending:
        question, thumbnails, answer = pending
        parts.append(f'{_asked(question, thumbnails)}<div class="answered waiting"><p dir="auto">{escape(answer)}')
    return "".join(parts)


def line_html(text: str, kind: str) -> str:
    """One line below the conversations; `kind` is "error", which is read out at once, or "note"."""
    return f'<p class="{kind}" role="{"alert" if kind == "error" else "status"}">{escape(text)}</p>' if text else ""


def _asked(question: str, thumbnails: Sequence[str]) -> str:
    pictures = "".join(
        f'<img src="{escape(uri)}" alt="picture {number}">' if uri else f'<span class="blank">picture {number}</span>'
        for number, uri in enumerate(thumbnails, 1)
    )
    shown = f'<div class="pictures">{pictures}</div>' if pictures else ""
    return f'<div class="asked">{shown}<p dir="auto">{escape(question)}</p></div>'


def _answered(item: Said) -> str:
    text = f'<p dir="auto">{escape(item.answer)}</p>' if item.answer else '<p class="nothing">(an empty answer)</p>'
    return f'<div class="answered">{text}<small>{escape(item.note)}</small></div>'
