"""The weights of a model that is loaded: saved ones put into it, and those that ZeRO-3 has split put together."""

from pathlib import Path
from typing import Any

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


class whole_weights:
    """While it lasts, each rank holds all weights that ZeRO-3 has split over the ranks, and need not wait for the others.

    Else every rank would have to answer as many tokens as any other.

    Args:
        model: as the Trainer has wrapped it; any other than an engine of ZeRO-3 is left as it is.
    """

    def __init__(self, model: Any):
        self._split = getattr(getattr(model, "optimizer", None), "parameter_offload", None)

    def __enter__(self) -> None:
        if self._split is not None:
            from deepspeed.runtime.zero import GatheredParameters

            self._gathered = GatheredParameters(list(self._split.module.parameters()))
            self._gathered.__enter__()
            # Its hooks, which would give up each layer's weights after the layer.
            self._split.destroy()

    def __exit__(self, *error) -> None:
        if self._split is not None:
            self._split.setup_zero_stage3_hooks()
            self._gathered.__exit__(*error)
