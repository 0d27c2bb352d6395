"""What a run goes on from: which checkpoint is whole, whether it belongs to this run, and whether the run is finished."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers.trainer_utils import sort_checkpoints

from ..arguments import RecipeArguments
from ..data.dataset import ConversationDataset
from ..errors import InputError
from ..results.evaluation import remove_stage

SETTINGS = "run.json"
SAVING = ".saving"  # where a checkpoint grows before it gets its name
# Settings that a run keeps from its first start to its end: with others it would be another run.
KEPT = (
    *("model_name_or_path", "strategy", "lora_rank", "lora_alpha_ratio", "lora_dropout", "compute_dtype", "num_crops"),
    *("batch_size", "num_train_epochs", "max_steps", "seed", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("weight_decay", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
)
# Settings that may change when a run goes on: how the same batches are spread, and what is asked before and after.
SPREAD = ("GPUs", "batch_size_per_gpu")
ASKED = ("rows to answer", "max_new_tokens")
# What DeepSpeed's and the Trainer's own files hold beside tensors; whatever else a pickle asks for is not loaded.
PICKLED = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
}


class Unfinished(InputError):
    """A checkpoint that was not written to its end."""


def run_settings(
    args: RecipeArguments, train_dataset: ConversationDataset, eval_dataset: ConversationDataset
) -> dict[str, Any]:
    """What a run is known by: its settings, its data, and how it is spread over processes."""
    settings = {name: str(getattr(args, name)) for name in KEPT}
    if os.path.isdir(args.model_name_or_path):
        settings["model_name_or_path"] = os.path.realpath(args.model_name_or_path)
    settings["rows to train on"] = _name_rows(train_dataset.rows)
    settings["rows to answer"] = _name_rows(eval_dataset.rows)
    settings["max_new_tokens"] = args.max_new_tokens
    settings["GPUs"] = args.world_size
    settings["batch_size_per_gpu"] = args.per_device_train_batch_size
    settings["engine"] = "DeepSpeed" if args.deepspeed else "DistributedDataParallel"
    return settings


def _name_rows(rows: Sequence) -> str:
    ids = rows["id"] if hasattr(rows, "column_names") else [row.get("id") for row in rows]
    digest = hashlib.sha256("\n".join(map(str, ids)).encode(errors="surrogatepass")).hexdigest()
    return f"{len(rows)} with ids of SHA-256 {digest:.16}"


def find_checkpoints(folder: Path) -> list[Path]:
    """checkpoint-N of a folder, newest first."""
    return [Path(path) for path in reversed(sort_checkpoints(str(folder)))]


def check_checkpoint(folder: Path, adapter: bool) -> None:
    """Checks, before a model is loaded, that a checkpoint is whole, of the kind that the run goes on from, and harmless.

    Args:
        folder (Path): checkpoint-N.
        adapter (bool): the run trains an adapter (LoRA, QLoRA) and not the model's own weights.

    Raises:
        InputError: if its state or its weights are missing or cut short, if it holds the other kind of weights, or if
            unpickling one of its files would run code.
    """
    kind = "adapter_model" if (folder / "adapter_config.json").exists() else "model"
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        files = {f"{kind}.safetensors"}
        if (folder / f"{kind}.safetensors.index.json").exists():
            index = json.loads((folder / f"{kind}.safetensors.index.json").read_text(encoding="utf-8"))
            files = set(index["weight_map"].values())
        for file in sorted(files):
            # Compares the length of the file with what its header promises.
            with safe_open(folder / file, "pt"):
                pass
        states = folder
        if (folder / "latest").exists():
            # The folder that DeepSpeed will read.
            states = folder / (folder / "latest").read_text(encoding="utf-8").strip()
            if states.resolve().parent != folder.resolve():
                raise InputError(f"{folder / 'latest'}: expected a folder of this checkpoint, found {states.resolve()}")
        pickles = sorted(path for path in {*folder.rglob("*"), *states.iterdir()} if path.suffix in (".pt", ".pth"))
        # A zip archive's directory stands at its end: a file that is cut short has none.
        unsafe = {path: set(get_unsafe_globals_in_checkpoint(path)) - PICKLED for path in pickles}
        if not any(states.glob("optimizer*" if states == folder else "*_optim_states.pt")):
            raise OSError("no optimizer states")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Unfinished(f"{folder}: expected a checkpoint that was written to its end, found: {reason}") from None
    for path, names in unsafe.items():
        if names:
            raise InputError(f"{path}: expected tensors, found a pickle of {min(names)}, which is not loaded")
    if (kind == "adapter_model") != adapter:
        kinds = ("the weights of a whole model", "an adapter")
        raise InputError(
            f"{folder}: expected {kinds[adapter]}, which this strategy goes on from, found {kinds[not adapter]}"
        )


def begin(args: RecipeArguments, train_dataset: ConversationDataset, eval_dataset: ConversationDataset) -> None:
    """Settles where the run begins: afresh, or at a checkpoint, which `args.resume_from_checkpoint` then names.

    The same command started again on the same --output_dir goes on from its newest whole checkpoint; --overwrite_output_dir
    starts afresh. A finished run ends the program with status 0. Answers that still hold are kept.

    Raises:
        InputError: if the folder or the checkpoint belongs to a run with other settings, or the checkpoint is not whole.
    """
    decision = [None, None, False]
    if args.process_index == 0:
        # One process decides: on a shared file system the others might see another state.
        try:
            decision = [None, *_decide(args, run_settings(args, train_dataset, eval_dataset))]
        except InputError as error:
            decision[0] = str(error)
    fault, args.resume_from_checkpoint, finished = broadcast_object_list(decision)
    if fault:
        raise InputError(fault)
    if finished:
        if args.process_index == 0:
            print(
                f"this run is finished, see {Path(args.output_dir) / 'report.html'}; --overwrite_output_dir starts afresh",
                flush=True,
            )
        sys.exit()


def _decide(args: RecipeArguments, settings: dict[str, Any]) -> tuple[str | None, bool]:
    """The checkpoint to go on from, and whether the run is finished; clears and marks the folder."""
    output, named = Path(args.output_dir), args.resume_from_checkpoint
    shutil.rmtree(output / SAVING, ignore_errors=True)
    earlier = _read_settings(output)
    if args.overwrite_output_dir:
        for path in (*find_checkpoints(output), output / SETTINGS):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        earlier = None
    finished = earlier is not None and (output / "report.html").exists()
    checkpoint, skipped = _choose(args, output)
    if checkpoint:
        _compare(settings, _read_settings(checkpoint), checkpoint)
    if finished:
        _compare(settings, earlier, output)
        if named is None and not any(name in _changes(settings, earlier) for name in ASKED):
            return None, True
    # Answers hold if the same model would be asked the same again: before training with the same settings, after it if
    # nothing is trained any more.
    changed = {"all": None} if earlier is None else _changes(settings, earlier)
    if set(changed) - set(SPREAD):
        remove_stage(output, "before")
    if set(changed) - set(SPREAD) or checkpoint is None or skipped or named:
        remove_stage(output, "after")
    (output / "report.html").unlink(missing_ok=True)
    (output / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    if checkpoint:
        print(f"going on from {checkpoint}", flush=True)
    return checkpoint and str(checkpoint), False


def _choose(args: RecipeArguments, output: Path) -> tuple[Path | None, bool]:
    """The checkpoint that the flags ask for, else the newest that is whole; and whether one had to be skipped for it."""
    if args.resume_from_checkpoint not in (None, "True"):
        check_checkpoint(Path(args.resume_from_checkpoint), args.use_lora)
        return Path(args.resume_from_checkpoint), False
    skipped = False
    if args.save_only_model and find_checkpoints(output):
        raise InputError(
            f"{output}: expected no checkpoint, because no run goes on from those of --save_only_model; found "
            f"{find_checkpoints(output)[0].name}; choose another --output_dir, or --overwrite_output_dir"
        )
    for path in find_checkpoints(output):
        try:
            check_checkpoint(path, args.use_lora)
            return path, skipped
        except Unfinished as error:
            # Out of the way of --save_total_limit, which counts by name.
            aside = path.with_name(f"unfinished-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            print(f"skipped: {error} (now {aside.name})", flush=True)
            skipped = True
    if args.resume_from_checkpoint:
        raise InputError(f"--resume_from_checkpoint: expected a whole checkpoint-N in {output}, found none")
    return None, skipped


def _read_settings(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _changes(settings: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Earlier values of the settings that have changed."""
    return {name: earlier.get(name) for name in settings if earlier.get(name) != settings[name]}


def _compare(settings: dict[str, Any], earlier: dict[str, Any] | None, folder: Path) -> None:
    """Refuses what would make another run of it, and says what else has changed; without a record all is taken."""
    for name, value in (_changes(settings, earlier) if earlier else {}).items():
        # ZeRO-2 keeps a share of the optimizer's state on each GPU.
        if name not in (*SPREAD, *ASKED) or (name == "GPUs" and settings["engine"] == "DeepSpeed"):
            raise InputError(
                f"{folder}: expected the settings that its run began with, found {name} {settings[name]} instead of "
                f"{value}; restore it, choose another --output_dir, or start afresh with --overwrite_output_dir"
            )
        print(f"changed: {name} {settings[name]} instead of {value}", flush=True)
