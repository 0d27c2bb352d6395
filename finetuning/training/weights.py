"""Puts saved weights into a model that is loaded."""

from pathlib import Path

from peft import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file

from ..errors import InputError


def load_weights(model, folder: Path) -> None:
    """Takes the weights, or the adapter, of an output folder or checkpoint.

    Args:
        model: as `load_model` gives it, with the strategy that the folder was trained with.
        folder (Path): with safetensors files.

    Raises:
        InputError: if weights are missing in it.
    """
    if (folder / "adapter_config.json").exists():
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        return
    missing = set(model.state_dict()) - set(model.all_tied_weights_keys)
    for path in sorted(folder.glob("model*.safetensors")):
        weights = load_file(path)
        model.load_state_dict(weights, strict=False)
        missing -= set(weights)
    if missing:
        raise InputError(f"{folder}: expected weights of the whole model, found none for {min(missing)}")
