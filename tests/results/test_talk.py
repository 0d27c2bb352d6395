"""A conversation as HTML: what others have written stays text."""

from html.parser import HTMLParser

import pytest
from hostile_texts import ATTACKS

from finetuning.data.conversation import Turn
from finetuning.results.side_by_side import Said
from finetuning.results.talk import line_html, talk_html


class Elements(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.names, self.texts = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("text", ATTACKS)
def test_a_text_adds_no_element_and_stays_whole(text):
    plain = Elements(talk_html([Said(Turn("q", ["a"]), "a", "note", ["data:image/webp;base64,AA"])], ("q", [""], "a")))
    hostile = Elements(
        talk_html([Said(Turn(text, ["a"]), text, text, ["data:image/webp;base64,AA"])], (text, [""], text))
    )
    assert hostile.names == plain.names
    assert "".join(hostile.texts).count(text) == 5
    assert Elements(line_html(text, "error")).names == ["p"]
    assert text in "".join(Elements(line_html(text, "error")).texts)


def test_a_longer_answer_only_appends():
    earlier = [Said(Turn("q", ["a"]), "a", "note")]
    assert talk_html(earlier, ("q", [], "one <b> two")).startswith(talk_html(earlier, ("q", [], "one <b>")))


def test_an_empty_answer_and_an_empty_conversation_say_so():
    assert "(an empty answer)" in talk_html([Said(Turn("q", ["-"]), "")])
    assert "Nothing was asked yet." in talk_html([])
    assert line_html("", "error") == ""
