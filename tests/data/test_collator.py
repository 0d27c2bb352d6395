"""Batches: padded and padding-free ones give the loss and gradients of the samples one by one."""

import pytest
import recipe
import tiny
import torch

from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.encoding import encode_conversation
from finetuning.training.loading import unused_layers

own_process = pytest.fixture(autouse=True)(recipe.own_process)

PAD = tiny.TOKENIZER.pad_token_id
TOLERANCE = 1e-5


def sample(question: str, sizes=(), answer="yes", name="x") -> dict:
    images = [tiny.picture(*size, seed=number) for number, size in enumerate(sizes)]
    return encode_conversation(Conversation(name, [Turn(question, [answer], images)]), tiny.processor())


def mixed() -> list[dict]:
    """0, 1 and 2 images, unequal lengths, one row past the 64 positions of tiny.py's short rope."""
    samples = [
        sample("What is it?", [(60, 40)], "a cat"),
        sample("Hello?", answer="hello"),
        sample("Compare these two pages. " * 3, [(40, 60), (90, 30)], "the same"),
        sample("Hm?", [(20, 20)], "1"),
    ]
    lengths = [len(item["input_ids"]) for item in samples]
    assert max(lengths) > tiny.LONG_AFTER > min(lengths)
    return samples


def without_ids(batch: dict) -> dict:
    """As `RecipeTrainer` gives it to the model."""
    return {name: value for name, value in batch.items() if name != "ids"}


def loss_and_gradients(model, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and gradient of every parameter, of all batches together, per label of them all."""
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in map(without_ids, batches):
        loss = model(**batch, num_items_in_batch=labels).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(model, samples, padding_free: bool):
    collate = DataCollatorForPhi3V(PAD, padding_free)
    expected, expected_gradients = loss_and_gradients(model, [DataCollatorForPhi3V(PAD)([item]) for item in samples])
    found, gradients = loss_and_gradients(model, [collate(samples)])
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert gradients.keys() == expected_gradients.keys()
    total = sum(gradient.square().sum() for gradient in expected_gradients.values()).sqrt()
    for name, gradient in gradients.items():
        error = (gradient - expected_gradients[name]).norm()
        # The second bound is for key biases, whose gradient is rounding only.
        assert error <= TOLERANCE * expected_gradients[name].norm() or error <= 1e-6 * total, name


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_packed", "eager"])
@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
def test_a_batch_gives_what_its_samples_give_one_by_one(attention, padding_free):
    model = tiny.model(attention=attention).train()
    check_equal(model, mixed(), padding_free)
    # the order must not matter either, the longest sample first or last
    check_equal(model, mixed()[::-1], padding_free)


@pytest.mark.parametrize(
    ("padding_free", "attention"),
    [(False, "sdpa"), (True, "sdpa"), (True, "sdpa_packed")],
    ids=["padded", "padding-free", "padding-free, sample by sample"],
)
def test_a_sample_past_4096_tokens_changes_nothing_for_its_neighbours(padding_free, attention):
    # the real limit, beside a short sample with an image
    model = tiny.model(
        attention=attention, num_hidden_layers=1, original_max_position_embeddings=4096, max_position_embeddings=131072
    ).train()
    long = sample("word " * 900, [(60, 40)], "long")
    assert len(long["input_ids"]) > 4096
    check_equal(model, [sample("What is it?", [(40, 40)], "a cat"), long, sample("Hello?")], padding_free)


def test_samples_of_a_padding_free_row_would_see_each_other_without_their_positions():
    # Guards the tests above: the difference they look for is not a small one.
    model = tiny.model().train()
    batch = without_ids(DataCollatorForPhi3V(PAD, padding_free=True)(mixed()))
    right = model(**batch).loss.item()
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    assert abs(model(**batch).loss.item() - right) > 0.01


def test_no_mask_over_all_samples_is_made_for_a_padding_free_row(monkeypatch):
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(query, *args, attn_mask=None, **kwargs):
        calls.append((query.shape[2], attn_mask))
        return attend(query, *args, attn_mask=attn_mask, **kwargs)

    model = tiny.model(attention="sdpa_packed")
    samples = [sample("Hello?"), sample("Who are you?")]
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model(**without_ids(DataCollatorForPhi3V(PAD, padding_free=True)(samples)))
    assert calls == 2 * [(len(item["input_ids"]), None) for item in samples]  # in each of two layers


def test_end_of_text_inside_a_row_stays_attended():
    # The model learns to write <|endoftext|>, which is also what pads: the mask goes by length.
    samples = mixed()
    batch = DataCollatorForPhi3V(PAD)(samples)
    for row, item in enumerate(samples):
        length = len(item["input_ids"])
        assert item["input_ids"][-1] == PAD
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert batch["labels"][row, length - 1] == PAD
        assert set(batch["labels"][row, length:].tolist()) <= {-100}
        assert set(batch["input_ids"][row, length:].tolist()) <= {PAD}


def test_shapes_and_order_of_a_padded_batch():
    samples = mixed()
    batch = DataCollatorForPhi3V(PAD)(samples)
    assert batch["input_ids"].shape == batch["labels"].shape == (4, max(len(item["input_ids"]) for item in samples))
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["attention_mask"].dtype == torch.int64
    with_images = [item for item in samples if "pixel_values" in item]
    assert torch.equal(batch["pixel_values"], torch.cat([item["pixel_values"] for item in with_images]))
    assert batch["image_sizes"].shape == (4, 2)


def test_shapes_and_bounds_of_a_padding_free_batch():
    samples = mixed()
    lengths = [len(item["input_ids"]) for item in samples]
    batch = DataCollatorForPhi3V(PAD, padding_free=True)(samples)
    assert "attention_mask" not in batch  # with one, transformers would not recognise the samples in the row
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, sum(lengths))
    assert batch["position_ids"][0].tolist() == [place for length in lengths for place in range(length)]
    bounds = batch["cu_seq_lens_q"]
    assert bounds.dtype == torch.int32
    assert bounds.diff().tolist() == lengths
    assert torch.equal(bounds, batch["cu_seq_lens_k"])
    assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)
    # no sample predicts the first token of the next one
    assert all(batch["labels"][0, start] == -100 for start in bounds[:-1].tolist())


@pytest.mark.parametrize("padding_free", [False, True])
def test_text_only_samples_give_no_pixels(padding_free):
    batch = DataCollatorForPhi3V(PAD, padding_free)([sample("Hello?"), sample("Who are you?")])
    assert "pixel_values" not in batch
    assert "image_sizes" not in batch


def test_a_label_on_a_first_token_is_no_target_of_the_sample_before():
    first = {"id": "a", "input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    batch = DataCollatorForPhi3V(PAD, padding_free=True)([first, first])
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 6, 7]]


# ---- places without a sample


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(value, expected[name]) if isinstance(value, torch.Tensor) else value == expected[name]
        for name, value in found.items()
    )


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("places", [(0,), (1, 2), (4,), (0, 2, 6)], ids=str)
def test_a_place_without_a_sample_leaves_no_trace(padding_free, places):
    collate, features = DataCollatorForPhi3V(PAD, padding_free), mixed()
    expected = collate(features)
    for place in places:
        features.insert(place, None)
    assert same(collate(features), expected)


def test_a_batch_knows_its_samples_by_name():
    features = [sample("a", name="one"), None, sample("b", [(20, 20)], name="two"), None]
    assert DataCollatorForPhi3V(PAD)(features)["ids"] == ["one", "two"]
    assert DataCollatorForPhi3V(PAD)([None])["ids"] == []


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("places", [1, 3])
def test_a_batch_of_no_sample_holds_two_tokens_that_count_nothing(padding_free, places):
    batch = DataCollatorForPhi3V(PAD, padding_free)([None] * places)
    assert batch["input_ids"].tolist() == [[PAD, PAD]]
    assert set(batch["labels"].flatten().tolist()) == {-100}
    assert "pixel_values" not in batch
    if padding_free:
        assert batch["position_ids"].tolist() == [[0, 1]]
        assert batch["cu_seq_lens_q"].tolist() == [0, 2]
    else:
        assert batch["attention_mask"].tolist() == [[1, 1]]


@pytest.mark.parametrize("frozen", [False, True], ids=["vision trained", "vision frozen"])
@pytest.mark.parametrize(
    "given",
    [
        pytest.param(None, id="no count"),
        pytest.param(5, id="count of the step"),
        pytest.param(
            0,
            id="a step without a label",
            # With --on_bad_row skip, where every picture of a step turns out to be damaged.
        ),
    ],
)
@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
def test_a_rank_without_a_sample_takes_part_and_counts_nothing(padding_free, given, frozen):
    model = tiny.model(attention="sdpa_packed" if padding_free else "sdpa").train()
    model.model.vision_embed_tokens.requires_grad_(not frozen)
    unused_layers(model).requires_grad_(False)
    batch = without_ids(DataCollatorForPhi3V(PAD, padding_free)([None, None]))
    loss = model(**batch, num_items_in_batch=None if given is None else torch.tensor(given)).loss
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        # each has a gradient, for which the other ranks wait, and it is 0
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or not parameter.grad.any(), name
