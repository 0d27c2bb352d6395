"""Several saved models to answer with: of a base that more than one of them needs, one copy is in memory."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from phi3v import Phi3VProcessor

from .loading import read_adapter, read_model, read_processor
from .saved import SavedModel, check_adapter

OWN_COPY = "default"


@dataclass
class Loading:
    """A saved model and how it is to be loaded: what it computes in, and whether its language model is quantised to 4 bits."""

    saved: SavedModel
    dtype: torch.dtype
    in_4_bits: bool


@dataclass
class Opened:
    """A saved model that is loaded, maybe in one with others.

    Args:
        saved (SavedModel): what was loaded.
        processor (Phi3VProcessor): its own, with the crops that it was trained with.
        dtype (torch.dtype): what it computes in.
        model: the whole model, or a PEFT model with the adapters of all that share the base.
        adapter (str, optional): its adapter's name there; None where it is the base itself.
        copy (int): number of the copy of a base in memory, from 0; the same for those that share it.
    """

    saved: SavedModel
    processor: Phi3VProcessor
    dtype: torch.dtype
    model: Any
    adapter: str | None
    copy: int

    @contextmanager
    def ready(self) -> Iterator[Any]:
        """The model that answers as this one alone would, the adapters of the others off; for one thread at a time."""
        if not isinstance(self.model, PeftModel):
            yield self.model
        elif self.adapter is None:
            with self.model.disable_adapter():
                # Not the PEFT model: over an adapter in float32 answers are computed under autocast, over none they are not.
                yield self.model.get_base_model()
        else:
            self.model.set_adapter(self.adapter)
            yield self.model


def open_several(wanted: Sequence[Loading], device: torch.device) -> list[Opened]:
    """Loads models to answer with, each base once for each dtype and quantisation in which it is needed.

    Raises:
        InputError: see `read_processor`, `read_model` and `read_adapter`.
    """
    processors = [read_processor(item.saved) for item in wanted]
    names = [_name_adapter(number, item.saved) for number, item in enumerate(wanted)]
    models: dict[tuple, Any] = {}
    opened = []
    for number, (item, name, processor) in enumerate(zip(wanted, names, processors, strict=True)):
        key = (os.path.realpath(item.saved.folder), item.dtype, item.in_4_bits, number if name == OWN_COPY else None)
        if key not in models:
            models[key] = read_model(item.saved, item.dtype, "sdpa", item.in_4_bits, device)
        if name:
            models[key] = read_adapter(models[key], item.saved, name)
        opened.append(Opened(item.saved, processor, item.dtype, None, name, list(models).index(key)))
    for found in opened:
        # Now that all adapters are over them: the first one has made another object of its base.
        found.model = list(models.values())[found.copy]
    return opened


def _name_adapter(number: int, saved: SavedModel) -> str | None:
    """What PEFT shall know an adapter by: `OWN_COPY` where the base can be no other's; None for a whole model."""
    if not saved.adapter:
        return None
    config = check_adapter(saved.adapter)
    # Trained biases lie in the base's own layers, PiSSA and its like take from the base what they begin with, and parts that
    # were trained in full are as large as what they stand for.
    if (
        config.get("bias", "none") == "none"
        and config.get("init_lora_weights", True) in (True, False, "gaussian")
        and not config.get("modules_to_save")
    ):
        return f"adapter_{number}"
    return OWN_COPY
