"""The model card: what the hub reads of it, that its code runs, that nothing in it takes effect, whose file it is."""

import json
import os
import re
from contextlib import chdir
from html.parser import HTMLParser
from pathlib import Path

import pushed
import pytest
import recipe
import tiny
from huggingface_hub import EvalResult, ModelCard, metadata_load
from markdown_it import MarkdownIt

from finetuning.results import card
from finetuning.training.identity import read_run

own_process = pytest.fixture(autouse=True)(recipe.own_process)
pytestmark = pytest.mark.timeout(240)

FACTS = {
    "name": "out",
    "title": "Reads pages.",
    "base": "microsoft/Phi-3.5-vision-instruct",
    "base_on_hub": True,
    "base_licence": "mit",
    "adapter": True,
    "strategy": "LoRA",
    "data": [
        {"name": "nielsr/docvqa_1200_examples", "config": None, "split": "train"},
        {"name": "nielsr/docvqa_1200_examples", "config": None, "split": "test"},
    ],
    "train_rows": 1000,
    "scores": {
        "before": {"figures": {"anls": 0.25}, "intervals": {"anls": [0.125, 0.375]}, "count": 200},
        "after": {"figures": {"anls": 0.75}, "intervals": {"anls": [0.625, 0.875]}, "count": 200},
    },
    "changed": {"use_lora": "True"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return recipe.model_folder(tmp_path_factory.mktemp("card") / "base")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return recipe.docvqa_rows(tmp_path_factory.mktemp("secret") / "pages", 6, 4)


def block(text: str, language: str) -> str:
    return re.search(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)[1]


@pytest.mark.parametrize("strategy", pushed.STRATEGIES)
def test_the_card_of_a_run(strategy, model, pages, tmp_path, monkeypatch, capsys):
    if strategy == "qlora":
        pytest.importorskip("bitsandbytes")
    (tmp_path / "base").symlink_to(model)
    output = pushed.run(monkeypatch, model, tmp_path / "out", "--data_dir", str(pages), *pushed.STRATEGIES[strategy])
    text, adapter = (output / "README.md").read_text(), "lora" in strategy
    metadata = metadata_load(output / "README.md")
    expected = {
        "library_name": "peft" if adapter else "transformers",
        "base_model_relation": "adapter" if adapter else "finetune",
        "pipeline_tag": "image-text-to-text",
        "metrics": ["anls"],
        "tags": ["phi3_v", "vision", strategy if adapter else "full"],
    }
    assert {key: metadata.get(key) for key in expected} == expected
    # What the library reads is what the run has measured.
    (result,) = ModelCard.load(output / "README.md").data.eval_results
    after = json.loads((output / "eval_after.json").read_text())
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("anls", round(after["anls"], 6), "pages")
    assert ModelCard(text).data.to_dict() == metadata
    # Written here, not by PEFT, and of this machine only folders' own names.
    assert "More Information Needed" not in text
    assert not list(output.glob("checkpoint-*/README.md"))
    assert not any(part in text for part in ("/tmp", str(tmp_path), "secret", os.getcwd(), str(Path.home())))
    assert "| rows trained on | 6 |" in text
    assert "| --batch_size | 4 |" in text
    assert re.search(r"\| versions \| python .*torch \d.*peft \d", text)
    # The lines run, in a folder in which the names are.
    tiny.picture(80, 60).save(tmp_path / "page.png")
    capsys.readouterr()
    with chdir(tmp_path):
        exec(block(text, "python"), {})
    assert len(capsys.readouterr().out) > 1
    assert f"finetuning.merge {output.name} merged" in text or not adapter
    # A finished run, started again, writes the same card.
    (output / "README.md").unlink()
    pushed.run(monkeypatch, model, output, "--data_dir", str(pages), *pushed.STRATEGIES[strategy])
    assert (output / "README.md").read_text() == text


def test_the_card_says_score_interval_data_and_licence(tmp_path):
    card.save_card(tmp_path, FACTS)
    text, found = (tmp_path / "README.md").read_text(), ModelCard.load(tmp_path / "README.md").data
    assert "| ANLS | 0.250 (0.125 – 0.375) | 0.750 (0.625 – 0.875) |\n| answers | 200 | 200 |\n\nOn nielsr" in text
    assert found.eval_results == [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="nielsr/docvqa_1200_examples",
            dataset_name="nielsr/docvqa_1200_examples",
            dataset_split="test",
            metric_type="anls",
            metric_name="ANLS",
            metric_value=0.75,
        )
    ]
    assert found.base_model == "microsoft/Phi-3.5-vision-instruct"
    assert found.license == "mit"
    assert found.datasets == ["nielsr/docvqa_1200_examples"]
    assert "nielsr/docvqa_1200_examples (train); nielsr/docvqa_1200_examples (test)" in text


def test_without_scores_or_data_there_is_a_card_too(tmp_path):
    card.save_card(tmp_path, {**FACTS, "data": [], "scores": {}, "changed": {}, "base_licence": None})
    assert "model-index" not in metadata_load(tmp_path / "README.md")
    assert "Nothing was answered." in (tmp_path / "README.md").read_text()


def test_the_licence_of_a_base_in_a_folder_is_the_one_of_its_card(tmp_path):
    assert card._licence("microsoft/Phi-3.5-vision-instruct") == "mit"
    assert card._licence("someone/else") is None
    for text, expected in (
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: [\n---\n", None),
        ("x", None),
    ):
        (tmp_path / "README.md").write_text(text)
        assert card._licence(str(tmp_path)) == expected


# ---- whose file it is


def test_a_readme_of_the_users_own_stays(model, pages, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("mine\n")
    output = pushed.run(monkeypatch, model, tmp_path / "out", "--data_dir", str(pages), *pushed.STRATEGIES["lora"])
    assert (output / "README.md").read_text() == "mine\n"
    assert (
        "README.md is none that was written here, or was edited since: it is left as it is" in capsys.readouterr().out
    )


def test_an_edited_card_stays_and_an_untouched_one_is_written_again(tmp_path):
    path = tmp_path / "README.md"
    card.save_card(tmp_path, FACTS)
    card.save_card(tmp_path, {**FACTS, "title": "Reads memes."})
    assert "Reads memes." in path.read_text()
    edited = path.read_text().replace("Reads memes.", "Reads my memes.")
    path.write_text(edited)
    card.save_card(tmp_path, FACTS)
    assert path.read_text() == edited
    path.write_text(edited + "A line below.\n")
    card.save_card(tmp_path, FACTS)
    assert path.read_text() == edited + "A line below.\n"


# ---- texts that others have written

HOSTILE = [
    "---\nlicense: evil\n---\n",
    'x"]: {{ 7*7 }} - !!python/object/apply:os.system [id]',
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "[click](javascript:alert(1)) ![x](http://evil/x.png)",
    "```\n</code>\n# heading\n| a | b |",
    "$(touch card-was-here) `id` '; id; '",
    "\u202e\x1b[31m\0 ü 字 &amp; -->",
    "&a *a null true ~ @ %",
]


class Tags(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found += [(tag, value or "") for name, value in attrs if name in ("href", "src")] or [(tag, "")]


def tags(text: str) -> list[tuple[str, str]]:
    body = text.split("\n---\n", 1)[1]
    return Tags(MarkdownIt("commonmark", {"html": True}).enable("table").render(body)).found


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_take_no_effect(text, tmp_path):
    plain, hostile = tmp_path / "plain", tmp_path / "hostile"
    plain.mkdir()
    hostile.mkdir()
    facts = {**FACTS, "base_on_hub": False, "data": [{"name": "pages"}]}
    card.save_card(plain, facts)
    scores = {
        stage: {**found, "figures": {text: 0.5}, "intervals": {}, "count": 2}
        for stage, found in FACTS["scores"].items()
    }
    named = {"name": text, "title": text, "base": text, "data": [{"name": text}], "changed": {"use_lora": text}}
    card.save_card(hostile, {**facts, **named, "scores": scores})
    shown = (hostile / "README.md").read_text(encoding="utf-8")
    # The same page, tag by tag, and the same metadata, key by key.
    assert tags(shown) == tags((plain / "README.md").read_text())
    metadata = metadata_load(hostile / "README.md")
    assert metadata.keys() == metadata_load(plain / "README.md").keys()
    assert metadata["library_name"] == "peft"
    assert ModelCard(shown).data.to_dict() == metadata
    compile(block(shown, "python"), "card", "exec")
    assert len(block(shown, "sh").splitlines()) == 3
    assert card.is_untouched(hostile / "README.md")


def test_settings_show_no_folder_of_this_machine(tmp_path):
    (tmp_path / "a b").mkdir()
    for value, expected in (
        (str(tmp_path / "a b"), "a b"),
        ("/home/jane doe/data/", "data"),
        ("~/data", "data"),
        ("../jane/data", "data"),
        ('{"offload": {"nvme_path": "/home/jane/nvme"}}', '{"offload": {"nvme_path": "nvme"}}'),
        ("microsoft/Phi-3.5-vision-instruct", "microsoft/Phi-3.5-vision-instruct"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        (0.5, "0.5"),
    ):
        assert card.hide_paths(value) == expected


def test_facts_are_kept_for_a_merged_model(model, pages, tmp_path, monkeypatch):
    output = pushed.run(monkeypatch, model, tmp_path / "out", "--data_dir", str(pages), *pushed.STRATEGIES["lora"])
    facts = read_run(output)["card"]
    (tmp_path / "merged").mkdir()
    card.write_merged_card(
        tmp_path / "merged", tmp_path / "merged", str(output), str(model), read_run(output), "bfloat16"
    )
    text = (tmp_path / "merged/README.md").read_text()
    assert facts["train_rows"] == 6
    assert "Merged from the adapter out; weights in bfloat16." in text
    assert "Measured with the adapter, before it was merged." in text
    found = ModelCard(text).data
    assert (found.base_model_relation, found.library_name) == ("finetune", "transformers")
    assert found.eval_results[0].dataset_name == "pages"
    # A checkpoint's score is not that of the final weights.
    (tmp_path / "other").mkdir()
    card.write_merged_card(
        tmp_path / "other", tmp_path / "other", str(output / "checkpoint-2"), str(model), read_run(output), "bfloat16"
    )
    assert "Nothing was answered." in (tmp_path / "other/README.md").read_text()
