"""Loss and token accuracy of the given answers: what the model's own loss says, however rows are batched."""

import pytest
import recipe
import tiny
import torch

from finetuning.arguments import parse_args
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import build_dataset
from finetuning.own_data_arguments import OwnDataArguments
from finetuning.results import evaluation
from finetuning.results.likelihood import measure_loss
from finetuning.results.predictions import Prediction

own_process = pytest.fixture(autouse=True)(recipe.own_process)


def to_conversation(row: dict) -> Conversation:
    images = [tiny.picture(30, 20, seed=row["id"])] * row["images"]
    turns = [
        Turn(f"Which {n}?", ["a", "page " * (row["id"] + 1)][n : n + 1], images if n == 0 else []) for n in range(2)
    ]
    return Conversation(str(row["id"]), turns)


def test_they_are_sums_over_tokens_whatever_the_batch(tmp_path):
    base = recipe.model_folder(tmp_path / "model")
    args = recipe.arguments(
        base, "--per_device_eval_batch_size", "3", "--dataloader_num_workers", "0", "--deepspeed", "none"
    )
    rows = [{"id": number, "images": number % 3} for number in range(7)]
    dataset = build_dataset(rows, to_conversation, tiny.processor(2), args, "eval")
    model = tiny.model()
    found = measure_loss(model, dataset, args)
    losses, right, tokens = 0.0, 0, 0
    for index in range(len(dataset)):
        features = dataset[index]
        features.pop("id")
        pixels = {name: features[name] for name in ("pixel_values", "image_sizes") if name in features}
        ids, labels = (torch.tensor([features[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            wanted = labels[0, 1:] != -100
            loss = model(input_ids=ids, labels=labels, **pixels).loss.item()
            best = model(input_ids=ids, **pixels).logits[0, :-1].argmax(-1)
        losses, tokens = losses + loss * wanted.sum().item(), tokens + wanted.sum().item()
        right += (best == labels[0, 1:])[wanted].sum().item()
    assert found["loss"] == pytest.approx(losses / tokens, rel=1e-5)
    assert found["token_accuracy"] == right / tokens


def score(predictions: list[Prediction]) -> dict[str, float]:
    return {"exact": sum(item.answer in item.references for item in predictions) / len(predictions)}


def test_what_was_measured_is_kept_until_rows_change_and_for_a_finished_run(tmp_path, monkeypatch):
    base = recipe.model_folder(tmp_path / "model")
    (tmp_path / "data").mkdir()
    given = [
        "--model_name_or_path",
        str(base),
        "--data_dir",
        str(tmp_path / "data"),
        "--output_dir",
        "output",
        "--no-tqdm",
    ]
    args = parse_args([*given, "--dataloader_num_workers", "0", "--max_new_tokens", "2"], kind=OwnDataArguments)
    rows, calls = [{"id": number, "images": 1} for number in range(3)], []

    def measure(*arguments):
        calls.append(arguments)
        return measure_loss(*arguments)

    monkeypatch.setattr(evaluation, "measure_loss", measure)

    def run(model, dataset):
        return evaluation.evaluate(model, dataset, score, args, "before")

    dataset = build_dataset(rows, to_conversation, tiny.processor(2), args, "eval")
    first = run(tiny.model(), dataset)
    assert set(first) >= {"exact", "loss", "token_accuracy"}
    assert run(tiny.model(), dataset) == first
    assert len(calls) == 1
    # Scored again without a model, by another score.
    monkeypatch.setitem(globals(), "score", lambda predictions: {"count": float(len(predictions))})
    again = run(None, dataset)
    assert (again["count"], again["loss"]) == (6, first["loss"])
    # Fewer rows.
    run(tiny.model(), build_dataset(rows[:2], to_conversation, tiny.processor(2), args, "eval"))
    assert len(calls) == 2
