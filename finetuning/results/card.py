"""The model card of an output or merged folder: README.md, with the metadata that the Hugging Face hub reads."""

import hashlib
import html
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData, metadata_load
from yaml import YAMLError

from ..arguments import RecipeArguments
from ..data.shown import printable
from ..training.checkpoint import read_manifest
from ..training.identity import read_run, write_run
from .overview import show, show_interval, show_name, summarise

CARD = "README.md"
TASK = "image-text-to-text"
# Source: the models' pages on the hub. Another base says its own licence in the metadata of its card.
LICENCES = {"microsoft/Phi-3.5-vision-instruct": "mit", "microsoft/Phi-3-vision-128k-instruct": "mit"}
SIGNATURE = re.compile(r"<!-- written by finetuning\.results\.card, ([0-9a-f]{16}); [^\n]* -->\n\Z")
SIGNED = "<!-- written by finetuning.results.card, {digest}; once the file is edited it is yours, and not written again -->\n"

PAGE = """\
# {{ name }}

{{ base }} {{ "with an adapter over it" if adapter else "fine-tuned" }} ({{ strategy }}) by the fine-tuning recipes for
Phi-3.5-vision. Script: {{ title }}
{% if merged %}
Merged from the adapter {{ merged }}; weights in {{ dtype }}.
{% endif %}

## Score

{{ scores or "Nothing was answered." }}
{% if scores %}

On {{ answered }}; 95% bootstrap intervals over rows.{{ " Measured with the adapter, before it was merged." if merged }}
{% endif %}

## Use

With the package `phi3v` of the recipes (no `trust_remote_code`):

```python
{{ code }}
```

In the folder of the recipes:

```sh
{{ commands }}
```

## Training

{{ training }}

Settings that differ from the recipes' defaults: {{ changed or "none." }}

## Licence

{{ licence }} The data ({{ trained_on }}) may have a licence of its own.
"""

# Where a run was at work, which is nobody else's business.
NOT_SHOWN = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "no-tqdm",
    "data_dir",
    "model_name_or_path",
}


def write_card(args: RecipeArguments, title: str, logs: list[dict[str, Any]], scores: Mapping[str, Any]) -> None:
    """Writes the card of a run whose final weights are there; its facts are kept in run.json, for the card of a merged model.

    Nothing in it names a path of this machine beyond a folder's own name.

    Args:
        args (RecipeArguments): the run's.
        title (str): what the task is, in a sentence.
        logs (list[dict]): what the Trainer has logged.
        scores (Mapping): stage -> {"figures": name -> value, "intervals": name -> (low, high), "count": answers}.
    """
    folder = Path(args.output_dir)
    run = read_run(folder)
    if run is None or read_manifest(folder) is None or not args.do_train:
        return
    attempts = run.get("attempts", [])
    last: dict[str, Any] = next((attempt for attempt in reversed(attempts) if attempt.get("train_rows")), {})
    summary = summarise(attempts, logs)
    base = args.model_name_or_path
    facts: dict[str, Any] = {
        "name": args.upload_to or folder.resolve().name,
        "title": printable(title),
        "base": _last(base),
        "base_on_hub": not os.path.isdir(base),
        "base_licence": _licence(base),
        "adapter": args.use_lora,
        "strategy": args.strategy,
        "in_4_bits": args.use_qlora,
        "data": args.hub_data or [{"name": _last(path)} for path in args.data_paths],
        "train_rows": last.get("train_rows", 0),
        "scores": {stage: scores[stage] for stage in ("before", "after") if stage in scores},
        "changed": {
            name: hide_paths(value)
            for name, value in last.get("changed", {}).items()
            if name not in NOT_SHOWN and not name.startswith(("hub_", "push_to_hub"))
        },
        "hardware": summary["device"],
        "time": ", ".join(
            f"{words} {summary[name]}"
            for name, words in (("training", "training"), ("duration", "whole run"))
            if summary[name]
        ),
        "speed": summary["speed"],
        "memory": summary["memory"],
        "commit": last.get("commit", ""),
        "versions": last.get("versions", {}),
    }
    # As they come back from the file.
    facts = json.loads(json.dumps(facts))
    write_run(folder, {**run, "card": facts})
    save_card(folder, facts)


def write_merged_card(folder: Path, to: Path, adapter: str, base: str, run: dict[str, Any], dtype: str) -> None:
    """Writes the card of a merged model: what its adapter's run is known by, and from what it was merged.

    Args:
        folder (Path): where the merged model lies now.
        to (Path): where it will lie.
        adapter (str): the adapter, a folder or a name on the hub.
        base (str): the model below it, likewise.
        run (dict): run.json of the adapter, empty where there is none.
        dtype (str): of the merged weights.
    """
    settings = run.get("settings", {})
    unknown = {
        "title": "A merged model.",
        "data": [],
        "scores": {},
        "changed": {},
        "in_4_bits": settings.get("use_qlora"),
    }
    # A checkpoint's may be that of the final weights.
    known = None if Path(adapter).name.startswith("checkpoint-") else run.get("card")
    known = known or {**unknown, "strategy": "QLoRA" if settings.get("use_qlora") else "LoRA"}
    merged = {
        "name": to.resolve().name,
        "base": _last(base),
        "base_on_hub": not os.path.isdir(base),
        "base_licence": _licence(base),
        "adapter": False,
        "merged": _last(adapter),
        "dtype": dtype,
    }
    save_card(folder, {**known, **merged})


def save_card(folder: Path, facts: dict[str, Any]) -> None:
    """Writes README.md, unless there is one that a person has written or edited."""
    path = folder / CARD
    if path.exists() and not is_untouched(path):
        print(f"{path} is none that was written here, or was edited since: it is left as it is", flush=True)
        return
    # Not ModelCard.save, which reads the text back and leaves out what it does not know.
    text = f"---\n{card_data(facts).to_yaml()}\n---\n\n{_render(facts)}\n\n"
    aside = path.with_name(f"{CARD}.part")
    aside.write_text(text + SIGNED.format(digest=_digest(text)), encoding="utf-8", newline="\n")
    aside.replace(path)
    print(f"model card -> {path}", flush=True)


def is_untouched(path: Path) -> bool:
    """Whether a card stands as it was written here, so that it may be written again: its last line is a digest of the rest."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    signature = SIGNATURE.search(text)
    return signature is not None and signature[1] == _digest(text[: signature.start()])


def card_data(facts: dict[str, Any]) -> ModelCardData:
    """The metadata that the hub reads."""
    adapter, after, data = facts["adapter"], facts["scores"].get("after", {"figures": {}}), facts["data"]
    named = [item["name"] for item in data if "split" in item]
    # The rows that were answered: the ones of the last split that was loaded.
    answered = data[-1] if data else {"name": "unknown"}
    name = facts["name"].split("/")[-1]
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=answered["name"] if named else _slug(answered["name"]),
            dataset_name=printable(answered["name"]),
            dataset_config=answered.get("config"),
            dataset_split=answered.get("split"),
            metric_type=_slug(figure),
            metric_name=printable(show_name(figure)),
            metric_value=round(value, 6),
        )
        for figure, value in after["figures"].items()
    ]
    strategy = "qlora" if facts.get("in_4_bits") else "lora" if adapter or facts.get("merged") else "full"
    return ModelCardData(
        base_model=facts["base"] if facts["base_on_hub"] else None,
        base_model_relation="adapter" if adapter else "finetune",
        library_name="peft" if adapter else "transformers",
        pipeline_tag=TASK,
        license=facts["base_licence"],
        datasets=list(dict.fromkeys(named)) or None,
        metrics=[_slug(figure) for figure in after["figures"]] or None,
        model_name=printable(name) if results else None,
        eval_results=results or None,
        tags=["phi3_v", "vision", strategy],
    )


def _render(facts: dict[str, Any]) -> str:
    data, scores, licence = (
        [to_markdown(_describe_data(item)) for item in facts["data"]],
        facts["scores"],
        facts["base_licence"],
    )
    figures = list(dict.fromkeys(name for found in scores.values() for name in found["figures"]))
    rows = [[show_name(name), *(_show_figure(found, name) for found in scores.values())] for name in figures]
    rows.append(["answers", *(f"{found['count']:,}" for found in scores.values())])
    changed = [(f"--{name}", value) for name, value in facts["changed"].items()]
    return jinja2.Template(PAGE, trim_blocks=True).render(
        name=to_markdown(facts["name"]),
        title=to_markdown(facts["title"]),
        base=_link(facts["base"]) if facts["base_on_hub"] else f"A model in a folder {to_markdown(facts['base'])}",
        adapter=facts["adapter"],
        strategy=to_markdown(facts["strategy"]),
        merged=to_markdown(facts.get("merged", "")),
        dtype=facts.get("dtype"),
        scores=_table(["", *(f"{stage} training" for stage in scores)], rows) if figures else "",
        answered=data[-1] if data else "unknown rows",
        code=example_code(facts),
        commands=_commands(facts),
        training=_table(["", ""], [[name, value] for name, value in _training(facts) if value]),
        changed="\n\n" + _table(["flag", "value"], changed) if changed else "",
        licence=(
            f"That of the base model: {to_markdown(licence)}."
            if licence
            else "That of the base model, which states none here."
        ),
        trained_on=" and ".join(dict.fromkeys(data)) or "unknown",
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(to_markdown, line))} |" for line in lines)


def example_code(facts: dict[str, Any]) -> str:
    """Lines that load the model, and lines that ask it about a picture."""
    # JSON's strings are Python's too, on one line and in ASCII.
    name, base = json.dumps(facts["name"]), json.dumps(facts["base"])
    adapter = facts["adapter"]
    whole = f'AutoModelForImageTextToText.from_pretrained({base if adapter else name}, dtype="auto")'
    return "\n".join(
        [
            "import phi3v",
            *(["from peft import PeftModel"] if adapter else []),
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            f"model = {f'PeftModel.from_pretrained({whole}, {name})' if adapter else whole}",
            f"processor = AutoProcessor.from_pretrained({name})",
            "",
            "from PIL import Image",
            'messages = [{"role": "user", "content": "<|image_1|>\\nWhat is written here?"}]',
            "prompt = processor.apply_chat_template(messages, add_generation_prompt=True)",
            'inputs = processor(prompt, [Image.open("page.png")], return_tensors="pt")',
            "tokens = model.generate(**inputs, max_new_tokens=64)[0, inputs['input_ids'].shape[1] :]",
            "print(processor.tokenizer.decode(tokens, skip_special_tokens=True))",
        ]
    )


def _commands(facts: dict[str, Any]) -> str:
    # A line break in a name would end the line of the command, and three backquotes the block.
    name = shlex.quote(printable(facts["name"]).replace("`", "?"))
    lines = [f'python -m finetuning.ask {name} --image page.png "What is written here?"']
    if facts["adapter"]:
        lines.append(f"python -m finetuning.merge {name} merged")
    served = "merged" if facts["adapter"] else name
    return "\n".join([*lines, f"vllm serve {served} --served-model-name phi3v --max-model-len 4096"])


def _training(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = facts.get("train_rows")
    return [
        ("data", "; ".join(map(_describe_data, facts["data"]))),
        ("rows trained on", f"{rows:,}" if rows else ""),
        ("strategy", facts["strategy"] + (" (over the base in 4 bits, nf4)" if facts.get("in_4_bits") else "")),
        ("hardware", facts.get("hardware", "")),
        ("time", facts.get("time", "")),
        ("speed", facts.get("speed", "")),
        ("peak memory of a process", facts.get("memory", "")),
        ("commit of the recipes", facts.get("commit", "")),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())),
    ]


def _describe_data(item: dict[str, Any]) -> str:
    if "split" not in item:
        return f"own data ({item['name']})"
    parts = [item["config"], item["split"]] if item.get("config") else [item["split"]]
    return f"{item['name']} ({', '.join(parts)})"


def _show_figure(found: dict[str, Any], name: str) -> str:
    if name not in found["figures"]:
        return ""
    interval = found["intervals"].get(name)
    return show(found["figures"][name]) + (f" ({show_interval(interval)})" if interval else "")


def to_markdown(text: str) -> str:
    """Any text as Markdown that shows it, on one line: no markup, HTML or end of a table's cell in it takes effect."""
    escaped = html.escape(printable(str(text), 500), quote=False)
    # An underscore inside a word is none of Markdown's.
    return re.sub(r"([\\`*\[\]|~$]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9]))", r"\\\1", escaped)


def _link(name: str) -> str:
    return f"[{to_markdown(name)}](https://huggingface.co/{name})"


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip("-.") or "data"


def _last(name: str) -> str:
    """A name on the hub as it is; of a folder its own name only."""
    return printable(Path(name).resolve().name) if os.path.isdir(name) or name.count("/") != 1 else name


def hide_paths(value: Any) -> str:
    """A setting without the folders of this machine: of each path only its last part."""
    text = str(value)
    if os.path.isabs(text) or text.startswith((".", "~")) or os.path.exists(text):
        return Path(text.rstrip("/")).name
    # Inside of JSON, say.
    return re.sub(r"(?<![\w/.:])~?/(?:[^\s\"',:;/]+/)+", "", text)


def _licence(base: str) -> str | None:
    """The licence of a base model: a known one, or what the metadata of its own card says."""
    if base in LICENCES or not os.path.isdir(base):
        return LICENCES.get(base)
    try:
        found = (metadata_load(Path(base) / CARD) or {}).get("license")
    except (OSError, ValueError, AttributeError, YAMLError):
        return None
    return _slug(found) if isinstance(found, str) else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
