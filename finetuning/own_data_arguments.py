"""The flags of finetune_hf_trainer_own_data.py, over those of all recipes: where rows are, and what scores the answers."""

import os
from dataclasses import dataclass
from pathlib import Path

from .arguments import RecipeArguments
from .arguments import _flag as flag
from .errors import InputError

# Frames of a clip: by default as convert_ucf101.py takes them, and most.
NUM_FRAMES, MOST_FRAMES = 8, 64
# Fields that --columns may name.
COLUMNS = (
    "id",
    "image",
    "images",
    "video",
    "videos",
    "question",
    "answer",
    "answers",
    "messages",
    "conversations",
    "system",
    "split",
)


@dataclass(frozen=True)
class Source:
    """Where rows are.

    Args:
        path (str): a folder or a file.
        share (float): rows of an epoch, as a share of all of them.
    """

    path: str
    share: float = 1.0


def parse_source(text: str) -> Source:
    """PATH or PATH:SHARE; a path that holds a colon itself comes first.

    Raises:
        InputError: if there is no such folder or file, or the share is no number over 0.
    """
    path, colon, share = text.rpartition(":")
    if os.path.exists(text) or not colon or not os.path.exists(path):
        path, share = text, "1"
    if not os.path.exists(path):
        raise InputError(f"--data_dir {text}: expected a folder or a file with rows, found no such path")
    try:
        number = float(share)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise InputError(
            f"--data_dir {text}: expected a share over 0 after the colon, such as {path}:0.5, found {share!r}"
        )
    return Source(path, number)


def parse_columns(pairs: list[str] | None) -> dict[str, str]:
    """Field of the forms that are known -> name of the column that holds it, of pairs such as "question=frage".

    Raises:
        InputError: for anything that is no such pair.
    """
    found: dict[str, str] = {}
    for pair in pairs or []:
        field, _, column = pair.partition("=")
        if field not in COLUMNS or not column:
            raise InputError(f"--columns {pair}: expected FIELD=COLUMN with one of the fields {', '.join(COLUMNS)}")
        if field in found or column in found.values():
            raise InputError(f"--columns {pair}: expected each field and column once, found one again")
        found[field] = column
    return found


@dataclass
class OwnDataArguments(RecipeArguments):
    """Arguments of a run on data of one's own; the help texts say what each is and in which unit."""

    data_dir: list[str] = flag(  # type: ignore[assignment]  # several places instead of one
        default=None,
        help="folders or files with rows: LLaVA, ShareGPT, messages, native, or columns image, question, answer; as jsonl, json, "
        "csv or Parquet. PATH:SHARE: samples that it gives to an epoch, as a share of its rows, such as 0.5 or 2",
    )
    dataset: str | None = flag(
        default=None, help="data set on the hub instead of --data_dir: OWNER/NAME or OWNER/NAME:CONFIG"
    )
    columns: list[str] = flag(
        default=None,
        help="names of columns that are called otherwise, such as image=path question=frage answer=antwort",
    )
    eval_share: float = flag(
        default=0.05,
        help="share of the rows that is answered and not trained, where the data have no test split; drawn by picture, 0 to below 1",
    )
    metric: list[str] = flag(
        default=None,
        help="what scores the answers, one or several, the first of which counts (default: by the answers' length)",
        metadata={"choices": ["anls", "exact_match", "rouge_l", "contains"]},
    )
    num_frames: int = flag(
        default=NUM_FRAMES, help="frames of a clip that are shown, evenly spread, each at 4 crops at most"
    )
    mixture: str | None = flag(
        default=None,
        help="even: each of several --data_dir gives equally many samples to an epoch, together as many as there are rows (default: all "
        "rows once, or the share after the colon of --data_dir PATH:SHARE)",
        metadata={"choices": ["even"]},
    )

    @property
    def measures_loss(self) -> bool:
        return True

    @property
    def source_names(self) -> list[str]:
        """What several sources are called, each otherwise: by their last folder or file, with its number where that is not enough."""
        names = [Path(source.path).resolve().stem for source in self.sources]
        if len(names) < 2:
            return []
        return [f"{name}-{number}" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]

    @property
    def shares(self) -> dict[str, float] | None:
        if self.mixture:
            return None
        # Of one source its rows have no name.
        return dict(zip(self.source_names or [""], (source.share for source in self.sources), strict=False))

    def _check_data(self):
        if (self.data_dir is None) == (self.dataset is None):
            found = "none" if self.data_dir is None else "both"
            raise InputError(f"--data_dir PATH ... or --dataset OWNER/NAME: expected one of them, found {found}")
        if self.full_train:
            raise InputError("--full_train: expected it left out; it is for the DocVQA script")
        if not 0 <= self.eval_share < 1:
            raise InputError(f"--eval_share {self.eval_share}: expected a number from 0 to below 1")
        self.column_of = parse_columns(self.columns)
        if not 1 <= self.num_frames <= MOST_FRAMES:
            raise InputError(f"--num_frames {self.num_frames}: expected a whole number from 1 to {MOST_FRAMES}")
        self.sources = [parse_source(text) for text in self.data_dir or []]
        if self.mixture and len(self.sources) < 2:
            raise InputError(
                f"--mixture {self.mixture}: expected several --data_dir, found {'one' if self.sources else 'none'}"
            )
        given = next((source for source in self.sources if source.share != 1), None)
        if self.mixture and given:
            raise InputError(
                f"--mixture {self.mixture} with --data_dir {given.path}:{given.share:g}: expected one of them; both say the share"
            )
        if self.sources:
            self.data_dir = [source.path for source in self.sources]
        self.metric = list(dict.fromkeys(self.metric or []))
