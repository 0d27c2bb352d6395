"""Finds what a run has saved, or a model as it is published: a whole model, or an adapter and the model below it."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments import check_model_name
from ..data.hub import fetch_model
from ..errors import InputError
from .identity import read_run
from .model_folder import LIMITS, check_file, is_complete, read_json

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass
class SavedModel:
    """Where the parts of a saved model lie.

    Args:
        name (str): as it was given: a folder, or a name on the hub.
        base (str): the whole model, by the name that the user or the adapter gives it.
        folder (Path): the whole model's on this machine: config, tokenizer, weights.
        adapter (Path, optional): folder of the adapter over it.
        settings (dict): arguments of the run that saved it, from run.json; empty where there is none.
    """

    name: str
    base: str
    folder: Path
    adapter: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def num_crops(self) -> int | None:
        """Most crops of an image that an adapter was trained with; a whole model's processor says it itself."""
        path = self.adapter and self.adapter / "preprocessor_config.json"
        return _read(path).get("num_crops") if path and path.exists() else None

    @property
    def in_4_bits(self) -> bool:
        """Whether it is an adapter that was trained over a model in 4 bits (QLoRA)."""
        return self.adapter is not None and bool(self.settings.get("use_qlora"))


def find_saved(name: str, base: str | None = None, fetches: bool = True) -> SavedModel:
    """Finds a model, a run's output folder, a checkpoint-N or an adapter; what is on the hub is fetched.

    Args:
        name (str): folder, or ORGANISATION/NAME on the hub.
        base (str, optional): the whole model below an adapter, instead of the one that its adapter_config.json names.
        fetches (bool): whether this process is the one that fetches; the others of its machine wait.

    Raises:
        InputError: if there is no such folder, or an adapter's base is not to be found.
    """
    folder = fetch_model(name, is_complete, fetches)
    if (folder / "config.json").exists() or not (folder / ADAPTER_CONFIG).exists():
        if base is not None:
            raise InputError(f"--base {base}: expected it left out, {name} is no adapter")
        return SavedModel(name, name, folder, settings=_settings(folder))
    config, settings = check_adapter(folder), _settings(folder)
    named = base or config.get("base_model_name_or_path")
    if not base and not os.path.isdir(str(named)):
        # As the run was given it, a path may be relative to where it was started; run.json has the whole one.
        named = settings.get("model_name_or_path", named)
    if not isinstance(named, str) or not named:
        raise InputError(f"{folder / ADAPTER_CONFIG}: expected the name of the base model, found none; give --base")
    try:
        check_model_name(named, "--base" if base else f"{folder / ADAPTER_CONFIG}: base_model_name_or_path")
    except InputError as error:
        raise InputError(str(error) if base else f"{error}; --base FOLDER says where the base model is now") from None
    below = fetch_model(named, is_complete, fetches)
    if not (below / "config.json").exists():
        raise InputError(f"{named}: expected the whole model below the adapter {name}, found no config.json in it")
    return SavedModel(name, named, below, folder, settings)


def check_adapter(folder: Path) -> dict[str, Any]:
    """The content of an adapter's adapter_config.json, if the adapter is one that these recipes and PEFT's LoRA know.

    Raises:
        InputError: for a file that is missing, no regular one or too large, another kind of adapter, or one that names code.
    """
    path = folder / ADAPTER_CONFIG
    check_file(path, folder, LIMITS["config.json"])
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: expected a LoRA adapter (peft_type LORA), found {str(config.get('peft_type')):.40}")
    for key in ("megatron_config", "auto_mapping"):
        if config.get(key) is not None:
            raise InputError(f"{path}: expected no {key}, which names code to import, found one; remove it")
    check_file(folder / ADAPTER_WEIGHTS, folder)
    return config


def _settings(folder: Path) -> dict[str, Any]:
    run = read_run(folder)
    return run["settings"] if run and isinstance(run["settings"], dict) else {}


def _read(path: Path) -> dict[str, Any]:
    check_file(path, path.parent, LIMITS["preprocessor_config.json"])
    return read_json(path)
