"""Checkpoints and final weights that prove that they are whole: sealed by a manifest, held against it before they are used."""

import json
import os
from pathlib import Path
from typing import Any

import xxhash
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers.trainer_utils import sort_checkpoints

from ..errors import InputError

MANIFEST = "manifest.json"
# What the Trainer writes for the final weights, beside what else a run leaves in its folder.
FINAL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"),
    *(
        "processor_config.json",
        "preprocessor_config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
    ),
    *("chat_template.*", "training_args.bin", "trainer_state.json"),
)
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


# Can only be read by setting it.
UMASK = os.umask(0o022)
os.umask(UMASK)


class Damaged(InputError):
    """A checkpoint that was not written to its end, or was changed since."""


def find_checkpoints(folder: Path) -> list[Path]:
    """checkpoint-N of a folder, newest first."""
    return [Path(path) for path in reversed(sort_checkpoints(str(folder)))]


def final_files(folder: Path) -> list[Path]:
    """The files of the final weights in an output folder."""
    return sorted({path for pattern in FINAL_FILES for path in folder.glob(pattern) if path.is_file()})


def seal(folder: Path, facts: dict[str, Any], files: list[Path] | None = None) -> None:
    """Writes, last of all, the manifest of what has been written into a folder: size and checksum of each file.

    All ranks call it together, when each has written its part, and share the reading.

    Args:
        folder (Path): checkpoint-N, or the output folder for the final weights.
        facts (dict): what the manifest says besides: step, identity of the run.
        files (list[Path], optional): the files that count; by default all in the folder.
    """
    state = PartialState()
    state.wait_for_everyone()
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if files is None else files
    files = [path for path in files if path.name != MANIFEST]
    mine = files[state.process_index :: state.num_processes]
    for path in mine:
        # safetensors writes files that only their owner can read, whatever the umask says.
        path.chmod(0o666 & ~UMASK)
    found = gather_object([(str(path.relative_to(folder)), *_measure(path, through=True)) for path in mine])
    if state.is_main_process:
        entries = {name: {"size": size, "xxh3_128": checksum} for name, size, checksum in sorted(found)}
        aside = folder / f"{MANIFEST}.part"
        aside.write_text(json.dumps({**facts, "files": entries}, indent=1) + "\n", encoding="utf-8")
        _sync(aside)
        aside.replace(folder / MANIFEST)
        _sync(folder)
        _sync(folder.parent)
    state.wait_for_everyone()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None where there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = isinstance(manifest["files"], dict) and manifest["files"] and isinstance(manifest["step"], int)
        return manifest if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_damage(folder: Path, identity: str | None = None) -> str | None:
    """What is wrong with a sealed folder: the first file that is missing or another than its manifest says; None if it holds.

    With the `identity` of a run it must be of that run too, and a checkpoint of the step in its name.

    All ranks call it together, share the reading, and get the same answer.
    """
    state, damage = PartialState(), []
    manifest = read_manifest(folder)
    if manifest is None:
        damage.append((0, f"it was not written to its end (no whole {MANIFEST})"))
    elif folder.name.startswith("checkpoint-") and folder.name != f"checkpoint-{manifest['step']}":
        damage.append((0, f"it is of step {manifest['step']}"))
    elif identity is not None and manifest.get("identity") != identity:
        damage.append((0, "it is of another run"))
    else:
        entries = sorted(manifest["files"].items())
        for number in range(state.process_index, len(entries), state.num_processes):
            name, entry = entries[number]
            path = folder / name
            try:
                if path.resolve().is_relative_to(folder.resolve()) and path.is_file():
                    found = _measure(path) if path.stat().st_size == entry["size"] else (path.stat().st_size, None)
                    if list(found) != [entry["size"], entry["xxh3_128"]]:
                        was = "other content" if found[1] else f"{found[0]} bytes instead of {entry['size']}"
                        damage.append((number, f"{name} is damaged ({was})"))
                else:
                    damage.append((number, f"{name} is missing"))
            except (OSError, KeyError, TypeError) as error:
                damage.append((number, f"{name} cannot be read ({error})"))
    damage = gather_object(damage)
    return min(damage)[1] if damage else None


def check_checkpoint(folder: Path, adapter: bool) -> None:
    """Checks, before a model is loaded, that a whole checkpoint is of the kind that the run goes on from, and harmless.

    Args:
        folder (Path): checkpoint-N.
        adapter (bool): the run trains an adapter (LoRA, QLoRA) and not the model's own weights.

    Raises:
        InputError: if it holds the other kind of weights or no optimizer states, or if unpickling one of its files would
            run code.
    """
    is_adapter = (folder / "adapter_config.json").exists()
    if is_adapter != adapter:
        kinds = ("the weights of a whole model", "an adapter")
        raise InputError(
            f"{folder}: expected {kinds[adapter]}, which this strategy goes on from, found {kinds[not adapter]}"
        )
    states = folder
    if (folder / "latest").exists():
        # The folder that DeepSpeed will read.
        states = folder / (folder / "latest").read_text(encoding="utf-8").strip()
        if states.resolve().parent != folder.resolve():
            raise InputError(f"{folder / 'latest'}: expected a folder of this checkpoint, found {states.resolve()}")
    if not any(states.glob("optimizer*" if states == folder else "*_optim_states.pt")):
        raise InputError(
            f"{folder}: expected optimizer states, found none: no run goes on from a checkpoint of --save_only_model; choose "
            "another --output_dir, or start afresh with --overwrite_output_dir"
        )
    for path in sorted(path for path in {*folder.rglob("*"), *states.iterdir()} if path.suffix in (".pt", ".pth")):
        try:
            unsafe = set(get_unsafe_globals_in_checkpoint(path)) - PICKLED
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise Damaged(f"{path}: expected tensors, found: {str(error).strip().splitlines()[0]}") from None
        if unsafe:
            raise InputError(f"{path}: expected tensors, found a pickle of {min(unsafe)}, which is not loaded")


def _measure(path: Path, through: bool = False) -> tuple[int, str]:
    """Size in bytes and checksum of a file, which is first written through to the disk if asked for."""
    checksum, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        if through:
            os.fsync(file.fileno())
        while block := file.read(1 << 24):
            checksum.update(block)
            size += len(block)
    return size, checksum.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
