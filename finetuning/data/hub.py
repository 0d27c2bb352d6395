"""Data sets of the hub."""

from datasets import Dataset, Image, List, load_dataset

from ..arguments import RecipeArguments
from ..errors import InputError


def load_hub(args: RecipeArguments, name: str, config: str | None = None, split: str = "train") -> Dataset:
    """A split of a data set on the hub, its images left undecoded, each row with an `id`.

    Raises:
        InputError: if it cannot be loaded.
    """
    try:
        with args.main_process_first():
            dataset = load_dataset(name, config, split=split)
    except Exception as error:  # the hub client raises a dozen kinds
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name}: expected this data set on the hub, found: {reason}; --data_dir takes your own"
        ) from error
    for column, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        if isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(column, List(Image(decode=False)))
    if "id" not in dataset.column_names:
        dataset = dataset.add_column("id", [f"{config or split}-{index}" for index in range(len(dataset))])
    return dataset
