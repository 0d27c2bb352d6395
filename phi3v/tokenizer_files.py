"""Tokenizer files that older readers take too: the base model's own, unchanged, wherever they are to be had."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

from .configuration_phi3_v import OFFICIAL_CODE

CONFIG, VOCABULARY = "tokenizer_config.json", "tokenizer.json"
# Of other readers: transformers 4.x, and slow tokenizers.
OTHER_FILES = ("special_tokens_map.json", "added_tokens.json", "tokenizer.model")
# What a caller may have set after loading; all else of a tokenizer_config.json says how to read tokenizer.json.
SET_LATER = ("padding_side", "truncation_side", "model_max_length")


def read_tokenizer_files(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Contents of the files that a tokenizer was loaded from, by name; none where they are gone or hold another vocabulary."""
    paths = {}
    for name in (CONFIG, VOCABULARY, *OTHER_FILES):
        try:
            paths[name] = Path(str(cached_file(tokenizer.name_or_path, name, local_files_only=True)))
        except (OSError, ValueError):  # not there, or no name of a folder
            continue
    if not {CONFIG, VOCABULARY} <= paths.keys():
        return {}
    files: dict[str, Any] = {name: path.read_bytes() for name, path in paths.items() if name != CONFIG}
    vocabulary = Tokenizer.from_buffer(files[VOCABULARY]).get_vocab(with_added_tokens=True)
    return files | {CONFIG: _read(paths[CONFIG])} if vocabulary == tokenizer.get_vocab() else {}


def write_tokenizer_files(
    tokenizer: PreTrainedTokenizerFast, folder: Path, source: dict[str, Any], chat_template: str | dict | None
) -> None:
    """Replaces the tokenizer files that transformers 5 has just written into a folder by what transformers 4.x reads as well.

    transformers 5 writes merges as pairs, which tokenizers before 0.20 cannot parse, a class `TokenizersBackend` and a list
    of extra_special_tokens, which transformers 4.x does not know. What the tokenizer was loaded from is written as it was;
    where that is gone, or was itself written by transformers 5, it is translated.

    Args:
        tokenizer (PreTrainedTokenizerFast): the tokenizer that was saved.
        folder (Path): where `tokenizer.save_pretrained` has written.
        source (dict): as `read_tokenizer_files` gave it before: the folder may be the one that the tokenizer came from.
        chat_template (str | dict, optional): put into tokenizer_config.json, where transformers 4.x looks for it.
    """
    written = _read(folder / CONFIG)
    config = dict(source.get(CONFIG, written))
    special = {name: _content(config.get(name)) for name in tokenizer.special_tokens_map}
    config |= {name: written[name] for name, found in special.items() if written.get(name, found) != found}
    config |= {name: getattr(tokenizer, name) for name in SET_LATER if name in config}
    for name in source.keys() - {CONFIG}:
        (folder / name).write_bytes(source[name])
    vocabulary = _read(folder / VOCABULARY)
    if _translate_merges(vocabulary["model"]):
        _write(folder / VOCABULARY, vocabulary)
    config = _translate_config(config) | {
        "auto_map": {"AutoProcessor": f"{OFFICIAL_CODE}processing_phi3_v.Phi3VProcessor"},
        "chat_template": chat_template,
        "processor_class": "Phi3VProcessor",
    }
    _write(folder / CONFIG, config)


def _translate_merges(model: dict[str, Any]) -> bool:
    """Writes the merges of tokenizer.json's model as texts, "a b", in place; whether they were pairs and could be."""
    merges = model.get("merges") or []
    if not merges or isinstance(merges[0], str) or any(" " in part for pair in merges for part in pair):
        return False
    model["merges"] = [" ".join(pair) for pair in merges]
    return True


def _translate_config(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json without what only transformers 5 reads, and with a class that takes tokenizer.json as it is.

    The official LlamaTokenizer does so in transformers 4.x, with a warning less; in transformers 5, wherever there is no
    config.json (beside an adapter, say), it splits blanks in another way than the model was trained on.
    """
    own = ("backend", "is_local", "local_files_only", "name_or_path")
    config = {key: value for key, value in config.items() if key not in own}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
