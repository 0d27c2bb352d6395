"""Loss and token accuracy of the given answers: how likely the model finds them, without generating anything."""

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from phi3v.modeling_phi3_v import IGNORE_INDEX

from ..arguments import RecipeArguments
from ..data.collator import DataCollatorForPhi3V
from ..data.dataset import ConversationDataset
from .answering import precision


# See `generate_answers`.
@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def measure_loss(model: Any, dataset: ConversationDataset, args: RecipeArguments) -> dict[str, float]:
    """Loss and token accuracy over all rows, on all ranks together.

    Args:
        model: the model or PEFT model, whole on each rank.
        dataset (ConversationDataset): the rows; of several acceptable answers one is taken, always the same.
        args (RecipeArguments): per_device_eval_batch_size, precision.

    Returns:
        dict: loss, nats per token of the answers; token_accuracy, share of these tokens that the model finds likeliest.
    """
    model.eval()
    mine = torch.utils.data.Subset(dataset, range(args.process_index, len(dataset), args.world_size))
    collate = DataCollatorForPhi3V(dataset.processor.tokenizer.pad_token_id)
    loader = DataLoader(
        mine, args.per_device_eval_batch_size, collate_fn=collate, num_workers=args.dataloader_num_workers
    )
    sums = torch.zeros(3, dtype=torch.float64)
    with precision(model, args.compute_dtype):
        for batch in loader:
            sums += _sums(
                model, {name: value.to(args.device) for name, value in batch.items() if name not in ("ids", "sources")}
            )
    if args.world_size > 1:
        sums = sums.to(args.device)
        dist.all_reduce(sums)
    loss, right, tokens = sums.tolist()
    return {"loss": loss / max(1, tokens), "token_accuracy": right / max(1, tokens)}


def _sums(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the losses, number of right tokens, and number of tokens of a batch, float64."""
    targets = batch.pop("labels")[:, 1:]  # (B, N - 1)
    # Only where a row of the batch has a target: logits of all places would be gigabytes.
    places = (targets != IGNORE_INDEX).any(0).nonzero()[:, 0]
    if not len(places):
        return torch.zeros(3, dtype=torch.float64)
    logits = model(**batch, logits_to_keep=places, use_cache=False).logits  # (B, places, V)
    targets = targets[:, places]
    wanted = targets != IGNORE_INDEX
    found, expected = logits[wanted].float(), targets[wanted]
    right = (found.argmax(-1) == expected).sum()
    return torch.stack([cross_entropy(found, expected, reduction="sum"), right, wanted.sum()]).double().cpu()
