"""What a run is known by: every argument that can change its result, and the conversations that it trains on."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..arguments import RecipeArguments
from ..data.fingerprint import Fingerprint, Fingerprints

RUN = "run.json"
ROWS = "run_rows.parquet"
# Arguments that cannot change the weights that come out; all others count, those of a later version too.
WITHOUT_EFFECT = {
    # where and what is written, logged and sent
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_strategy", "save_steps", "save_total_limit"),
    *("save_only_model", "save_on_each_node", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint"),
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id"),
    *("trackio_bucket_id", "trackio_static_space_id", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id"),
    *("hub_strategy", "hub_always_push", "hub_revision", "include_num_input_tokens_seen", "skip_memory_metrics", "debug"),
    # what is evaluated: the kept answers are compared with the questions one by one
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps", "eval_do_concat_batches"),
    *("eval_use_gather_object", "eval_split", "eval_size", "eval_rows_during_training", "report_rows", "metric", "include_for_metrics", "batch_eval_metrics", "max_new_tokens"),
    *("prediction_loss_only", "per_device_eval_batch_size", "bf16_full_eval", "fp16_full_eval", "do_train", "do_eval"),
    *("do_predict", "label_names"),
    # which rows there are: their conversations are compared
    *("data_dir", "dataset", "columns", "eval_share", "num_frames", "full_train", "check", "on_bad_row", "max_bad_rows", "max_image_pixels", "max_length"),
    # how the same steps are computed, spread and fed; the number of processes is compared by itself
    *("per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "recompute"),
    *("activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs", "local_rank"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_in_order"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "length_column_name", "ddp_timeout"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend"),
    *("torch_empty_cache_steps", "remove_unused_columns", "use_cache", "on_nonfinite"),
}  # fmt: skip
# They settle which checkpoint the result comes from, where the best one is taken.
CHOOSING_THE_BEST = {
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "save_strategy",
    "save_steps",
    "eval_split",
    "eval_size",
    "eval_rows_during_training",
    "max_new_tokens",
}
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "adapter_config.json",
    "*processor_config.json",
    "tokenizer*.json",
)
SAMPLED_BYTES, SAMPLES = 4096, 64
# What of a fingerprint tells two conversations apart.
CONTENT = ["id", "prompts", "answers", "pictures"]


def settings_of(args: RecipeArguments) -> dict[str, Any]:
    """Name -> value of every argument that can change the result, as JSON holds it; a file counts by its content."""
    chosen = args.load_best_model_at_end or args.early_stopping_patience
    without_effect = WITHOUT_EFFECT - (CHOOSING_THE_BEST if chosen else set())
    names = [field.name for field in fields(args) if field.init and field.name not in without_effect]
    settings = {name: _plain(getattr(args, name)) for name in names}
    settings["deepspeed"] = _plain(args.deepspeed_config)
    if args.shares and any(share != 1 for share in args.shares.values()):
        settings["shares of the sources"] = list(args.shares.values())
    name = args.model_name_or_path
    settings["model_name_or_path"] = os.path.realpath(name) if os.path.isdir(name) else name
    settings["weights of the model"] = identify_model(name)
    return settings


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def identify_model(name: str) -> str | None:
    """Digest of the weights and configuration of a model folder, from samples of each file; None for a name on the hub."""
    if not os.path.isdir(name):
        return None
    found = hashlib.sha256()
    for path in sorted(path for pattern in MODEL_FILES for path in Path(name).glob(pattern) if path.is_file()):
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(SAMPLED_BYTES, size // SAMPLES)):
                file.seek(start)
                found.update(file.read(SAMPLED_BYTES))
    return found.hexdigest()[:16]


def spread_of(args: RecipeArguments) -> dict[str, Any]:
    """How the run is spread over processes; it may change from start to start, but for DeepSpeed's checkpoints."""
    engine = "DeepSpeed" if args.deepspeed_config else "DistributedDataParallel"
    return {"processes": args.world_size, "batch_size_per_gpu": args.per_device_train_batch_size, "engine": engine}


def write_run(folder: Path, record: dict[str, Any], rows: Mapping[str, Sequence[Fingerprint]] | None = None) -> None:
    """Writes what the run is known by: run.json and, with `rows` (split -> fingerprints), run_rows.parquet."""
    if rows is not None:
        tables = [
            Fingerprints.of(known).table.add_column(0, "split", pa.array([split] * len(known), pa.string()))
            for split, known in rows.items()
        ]
        table = pa.concat_tables(tables)
        # In groups: what is being written of one is held in memory a second time.
        pq.write_table(table, folder / f"{ROWS}.part", compression="zstd", row_group_size=100_000)
        (folder / f"{ROWS}.part").replace(folder / ROWS)
    aside = folder / f"{RUN}.part"
    aside.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(folder / RUN)


def read_run(folder: Path) -> dict[str, Any] | None:
    """The run that a folder holds, None where there is none."""
    try:
        record = json.loads((folder / RUN).read_text(encoding="utf-8"))
        return record if {"script", "settings", "spread", "rows", "started"} <= record.keys() else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def read_rows(folder: Path, split: str) -> Fingerprints | None:
    """Fingerprints of the rows that the run in a folder began with; None if they are not there."""
    try:
        table = pq.read_table(folder / ROWS, filters=[("split", "==", split)])
        return Fingerprints(table.select(Fingerprints.SCHEMA.names).cast(Fingerprints.SCHEMA))
    except (OSError, ValueError, LookupError, pa.ArrowException):
        return None


def digest_rows(rows: Iterable[Fingerprint]) -> str:
    """Digest of what is trained: texts, answers and pictures, in order."""
    found = hashlib.sha256()
    for name, *parts in Fingerprints.of(rows).values(*CONTENT):
        found.update(b"\0".join((name.encode(), *parts)))
    return f"{found.hexdigest():.16}"


def describe_settings(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """What differs between the arguments of two runs, each as `name value instead of earlier value`."""
    return [
        f"{name} {_short(now.get(name))} instead of {_short(then.get(name))}"
        for name in dict.fromkeys([*now, *then])
        if now.get(name) != then.get(name)
    ]


def describe_rows(now: Sequence[Fingerprint], then: Sequence[Fingerprint] | None, purpose: str) -> str | None:
    """What differs between the conversations of two runs, in words, with the first one that does; None if nothing does."""
    if then is None:
        return f"other rows {purpose}"
    now, then = Fingerprints.of(now), Fingerprints.of(then)
    if now.table.select(CONTENT).equals(then.table.select(CONTENT)):
        return None
    earlier, found = {known.id: known for known in then}, {known.id: known for known in now}
    changed = [known for known in now if known.id in earlier and _content(known) != _content(earlier[known.id])]
    new, gone = [name for name in found if name not in earlier], [name for name in earlier if name not in found]
    parts = []
    for kind in ("prompts", "answers", "pictures"):
        others = [known for known in changed if getattr(known, kind) != getattr(earlier[known.id], kind)]
        if others:
            first = others[0]
            shown = _difference(earlier[first.id].text, first.text)
            parts.append(
                f"other {kind} in {len(others)} of {len(now)} rows {purpose} (first {_short(first.id)}{shown})"
            )
    if new:
        parts.append(f"{len(new)} more rows {purpose} (first {_short(new[0])})")
    if gone:
        parts.append(f"{len(gone)} rows {purpose} missing (first {_short(gone[0])})")
    if not parts:
        moved = next(known.id for known, before in zip(now, then, strict=True) if known.id != before.id)
        parts.append(f"the rows {purpose} in another order (first {_short(moved)})")
    return ", ".join(parts)


def _content(known: Fingerprint) -> tuple:
    return tuple(getattr(known, name) for name in CONTENT)


def _difference(before: str, after: str) -> str:
    """Both texts from a little before the place where they part."""
    if not before or not after or before == after:
        return ""
    start = max(0, len(os.path.commonprefix([before, after])) - 12)
    lead = "..." if start else ""
    return f": {_short(lead + after[start:])} instead of {_short(lead + before[start:])}"


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1] if text[-1] in chr(34) + chr(39) else ''}"


def time_of(stamp: str) -> str:
    """A time stamp as people say it: the hour today, else the day too."""
    when = datetime.fromisoformat(stamp)
    return f"{when:%H:%M}" if when.date() == datetime.now().date() else f"{when:%Y-%m-%d %H:%M}"
