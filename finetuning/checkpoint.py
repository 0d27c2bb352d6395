"""Checkpoints that a run goes on from."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import InputError


def check_checkpoint(folder: Path, adapter: bool) -> None:
    """Checks, before a model is loaded, that a checkpoint is whole and of the kind that the run goes on from.

    Args:
        folder (Path): checkpoint-N.
        adapter (bool): the run trains an adapter (LoRA, QLoRA) and not the model's own weights.

    Raises:
        InputError: if its state or its weights are missing or cut short, or if it holds the other kind of weights.
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
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{folder}: expected a checkpoint that was written to its end, found: {error}; take the one before it"
        ) from None
    if (kind == "adapter_model") != adapter:
        kinds = ("the weights of a whole model", "an adapter")
        raise InputError(
            f"{folder}: expected {kinds[adapter]}, which this strategy goes on from, found {kinds[not adapter]}"
        )
