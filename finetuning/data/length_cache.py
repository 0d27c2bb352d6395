"""Lengths in tokens, kept from run to run by what they were counted of: a start that finds them opens no picture."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from huggingface_hub.constants import HF_ASSETS_CACHE

from phi3v import Phi3VProcessor

from ..environment import pixel_limit
from .fingerprint import Fingerprint, digest

# Counts up when lengths are counted in another way.
VERSION = 1
UNKNOWN = -1


def cache_file(processor: Phi3VProcessor, *data: Any) -> Path:
    """The file for the lengths of some data, in the folder that huggingface_hub keeps for other libraries ($HF_ASSETS_CACHE).

    Args:
        processor (Phi3VProcessor): all of it that a length depends on is part of the file's name.
        *data: what tells the data from others, such as its folder and split: it only keeps their files apart, for lengths are
            found by content.
    """
    images, tokenizer = processor.image_processor, processor.tokenizer
    counting = [VERSION, pixel_limit(), sorted(images.to_dict().items(), key=lambda item: item[0])]
    counting += [tokenizer.backend_tokenizer.to_str(), processor.chat_template]
    folder = Path(os.environ.get("HF_ASSETS_CACHE") or HF_ASSETS_CACHE).expanduser()
    return folder / "phi3v-finetuning" / "lengths" / f"{digest(counting).hex()}-{digest(data).hex()}.parquet"


def key_of(known: Fingerprint) -> int:
    """64 bits of all that the length of a conversation depends on: texts, answers, and pictures by name, size and time."""
    return xxhash.xxh3_64_intdigest(known.prompts + known.answers + known.pictures)


class LengthCache:
    """Lengths by key, read from a file; none where there is no file, or a damaged one, which is said.

    Args:
        path (Path): see `cache_file`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.keys, self._lengths = np.zeros(0, np.uint64), np.zeros(0, np.int32)
        self.damage: str | None = None
        try:
            # Each page holds a checksum.
            table = pq.read_table(path, page_checksum_verification=True, memory_map=False)
            keys, lengths = table["key"].to_numpy(), table["length"].to_numpy()
            if keys.dtype != np.uint64 or lengths.dtype != np.int32 or not (keys[1:] > keys[:-1]).all():
                raise ValueError("other columns")
            self.keys, self._lengths = keys, lengths
        except FileNotFoundError:
            pass
        except (OSError, ValueError, LookupError, pa.ArrowException) as error:
            self.damage = (str(error).splitlines() or [type(error).__name__])[0]

    def find(self, keys: Sequence[int] | np.ndarray) -> np.ndarray:
        """Length of each key, int32, `UNKNOWN` where there is none."""
        asked = np.asarray(keys, np.uint64)
        if not len(self.keys):
            return np.full(len(asked), UNKNOWN, np.int32)
        places = np.searchsorted(self.keys, asked).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == asked, self._lengths[places], UNKNOWN).astype(np.int32)

    def forget(self) -> None:
        """Leaves the file's lengths out."""
        self.keys, self._lengths = self.keys[:0], self._lengths[:0]

    def write(self, keys: np.ndarray, lengths: np.ndarray) -> None:
        """Writes just these lengths, whole or not at all; another process may do the same.

        Raises:
            OSError: if the file cannot be written.
        """
        unique, first = np.unique(keys, return_index=True)
        table = pa.table({"key": unique.astype(np.uint64), "length": lengths[first].astype(np.int32)})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=".", delete=False) as aside:
            try:
                pq.write_table(table, aside, use_dictionary=False, compression="none", write_page_checksum=True)
                aside.close()
                os.replace(aside.name, self.path)
            except BaseException:
                os.unlink(aside.name)
                raise
