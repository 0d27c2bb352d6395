"""Data sets and model folders of the hub."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

from .download import Progress, fetch

if TYPE_CHECKING:
    from datasets import Dataset

    from ..arguments import RecipeArguments

# All that is read of a model; a folder's code and pickled weights are not even fetched.
MODEL_FILES = [
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("chat_template.jinja", "chat_template.json", "model.safetensors.index.json", "*.safetensors"),
    *("adapter_config.json", "run.json"),
]


def load_hub(args: "RecipeArguments", name: str, config: str | None = None, split: str = "train") -> "Dataset | list":
    """A split of a data set on the hub, its images left undecoded, each row with an `id`; no rows where none are needed.

    What is in the cache is taken as it is; the hub is only asked for what is not. Rows to train on (split "train") are not
    fetched with --do_train False.

    Raises:
        InputError: if it cannot be loaded.
    """
    # Not above: the converter imports this file, and needs no data sets.
    from datasets import Image, List

    if split == "train" and not args.do_train:
        return []
    dataset = _load(args, name, config, split)
    for column, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        if isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(column, List(Image(decode=False)))
    args.hub_data.append({"name": name, "config": config, "split": split})
    if "id" not in dataset.column_names:
        dataset = dataset.add_column("id", [f"{config or split}-{index}" for index in range(len(dataset))])
    return dataset


def load_hub_splits(args: "RecipeArguments", name: str, config: str | None = None) -> "dict[str, Dataset]":
    """All splits of a data set on the hub by name, as its files hold them; what is in the cache is taken as it is.

    Raises:
        InputError: if it cannot be loaded.
    """
    return {str(split): rows for split, rows in _load(args, name, config, None).items()}


def _load(args: "RecipeArguments", name: str, config: str | None, split: str | None) -> Any:
    return fetch(
        f"{name} ({config})" if config else name,
        lambda: _cached_split(name, config, split),
        lambda progress: _fetch_data_set(name, config, split, progress),
        "--data_dir takes your own data",
        args.local_process_index == 0,
    )


def _cached_split(name: str, config: str | None, split: str | None) -> Any:
    """The split, or all of them by name, as the library wrote it when it was loaded before, or from a download of the whole repository."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    try:
        # What `load_dataset` does in offline mode, which can only be set for a whole process, before its imports.
        builder = Cache(dataset_name=name.split("/")[-1], config_name=config, version="auto", hash="auto", repo_id=name)
        return builder.as_dataset(split=split)
    except Exception:  # Not there, another split, or damaged: the library raises a dozen kinds.
        pass
    finally:
        datasets.logging.set_verbosity(level)
    try:
        # `hf download --repo-type dataset NAME`: only where the list of its files proves that all of them are there.
        get_cached_repo_tree(name, repo_type="dataset")
        folder = snapshot_download(name, repo_type="dataset", local_files_only=True)
        return quietly(datasets.load_dataset, folder, config, split=split)
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        return None


def _fetch_data_set(name: str, config: str | None, split: str | None, progress: Progress) -> None:
    import datasets

    # First, because its errors say whether the repository is gated, private or missing; those of `datasets` do not.
    _snapshot(name, "dataset", None, ["README.md"], progress)
    builder = quietly(datasets.load_dataset_builder, name, config)
    files = [str(file) for found in (builder.config.data_files or {}).values() for file in found]
    parts = [re.fullmatch(r"hf://datasets/[^@]+@([0-9a-f]{40})/(.+)", file) for file in files]
    paths = [part[2] for part in parts if part]
    if paths:
        revision = next(part[1] for part in parts if part)
        # Several at once, with progress; the library then finds them in the cache.
        _snapshot(name, "dataset", revision, paths, progress)
    progress.downloading = False
    quietly(builder.download_and_prepare)
    quietly(builder.as_dataset, split=split)  # An unknown split is an error here, where its names are known.


def quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a function of the library without its progress bars and warnings."""
    import datasets

    level, bars = datasets.logging.get_verbosity(), datasets.utils.are_progress_bars_disabled()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        return function(*args, **kwargs)
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _snapshot(
    name: str,
    kind: str,
    revision: str | None,
    patterns: list[str],
    progress: Progress,
    ignore: str | None = None,
) -> None:
    snapshot_download(
        name,
        repo_type=kind,
        revision=revision,
        # Of fnmatch's special characters only the star is meant; the others stand for themselves in the name of a file.
        allow_patterns=[re.sub(r"([\[?])", r"[\1]", pattern) for pattern in patterns],
        ignore_patterns=ignore,
        tqdm_class=progress.bar(),
    )


def fetch_model(name: str, is_complete: Callable[[Path], bool], fetches: bool = True) -> Path:
    """Folder of a model: `name` itself if it is one, else what the hub's cache holds, fetched if need be.

    Args:
        name (str): folder, or ORGANISATION/NAME on the hub.
        is_complete (Callable): whether a folder of the cache holds all of a model. A cache that another version of the
            library filled does not say so itself.
        fetches (bool): see `fetch`.

    Raises:
        InputError: if it cannot be fetched.
    """
    if Path(name).is_dir():
        return Path(name)
    return fetch(
        name,
        lambda: _cached_model(name, is_complete),
        lambda progress: _snapshot(name, "model", None, MODEL_FILES, progress, ignore="*/*"),
        "--model_name_or_path FOLDER takes a model on this machine",
        fetches,
    )


def _cached_model(name: str, is_complete: Callable[[Path], bool]) -> Path | None:
    try:
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=MODEL_FILES, ignore_patterns="*/*"))
    except LocalEntryNotFoundError:
        return None
    return folder if is_complete(folder) else None


def fetch_file(name: str, file: str, cure: str) -> Path:
    """One file of a data set on the hub, fetched unless it is in the cache.

    Raises:
        InputError: if it cannot be fetched.
    """

    def cached() -> Path | None:
        try:
            return Path(hf_hub_download(name, file, repo_type="dataset", local_files_only=True))
        except LocalEntryNotFoundError:
            return None

    return fetch(f"{name}: {file}", cached, lambda progress: _snapshot(name, "dataset", None, [file], progress), cure)
