"""Phi3VForCausalLM on a tiny model: weights on disk, batches, packing, rope, gradients and errors.

Generation is in test_model_generation.py, equality with the official code in parity/.
"""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from phi3v import Phi3VForCausalLM
from phi3v.modeling_phi3_v import Phi3VRotaryEmbedding

PROCESSOR = tiny.processor()
WIDE, SQUARE = tiny.picture(80, 20, 1), tiny.picture(30, 30, 2)  # 4 + 1 crops each, 25 and 27 image tokens
SHORT_TEXT = PROCESSOR("hello you")
ONE_IMAGE = PROCESSOR("<|image_1|> what?", WIDE)
TWO_IMAGES = PROCESSOR("<|image_2|> and <|image_1|>", [WIDE, SQUARE])
LONG_TEXT = PROCESSOR("x " * 50)  # past the short rope's 64 tokens
ROWS = [SHORT_TEXT, ONE_IMAGE, TWO_IMAGES, LONG_TEXT]
KERNELS = pytest.mark.parametrize("attention", ["eager", "sdpa", "sdpa_packed"])


def with_labels(row: dict) -> dict:
    """Labels on all text but the first token, which nothing predicts."""
    labels = row["input_ids"].masked_fill(row["input_ids"] == PROCESSOR.image_token_id, -100)
    labels[:, 0] = -100
    return {**row, "labels": labels}


def images_of(rows: list[dict]) -> dict:
    rows = [row for row in rows if "pixel_values" in row]
    return {key: torch.cat([row[key] for row in rows]) for key in ("pixel_values", "image_sizes") if rows}


def padded(rows: list[dict], side: str) -> dict:
    def pad(name, value):
        values = [row[name][0] for row in rows]
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value, padding_side=side)

    fill = {"input_ids": PROCESSOR.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
    return {name: pad(name, value) for name, value in fill.items() if name in rows[0]} | images_of(rows)


def packed(rows: list[dict]) -> dict:
    joined = {name: torch.cat([row[name] for row in rows], 1) for name in ("input_ids", "labels") if name in rows[0]}
    positions = torch.cat([torch.arange(row["input_ids"].shape[1]) for row in rows])[None]
    return joined | {"position_ids": positions} | images_of(rows)


def gradients(model, *batches: dict, **kwargs) -> tuple[float, dict]:
    """Summed loss of the batches and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = model(**batch, **kwargs).loss
        loss.backward()
        total += loss.item()
    return total, {name: tensor.grad for name, tensor in model.named_parameters()}


def assert_same_gradients(found: dict, expected: dict):
    assert {name for name, grad in found.items() if grad is None} == {n for n, grad in expected.items() if grad is None}
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(
                found[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


def count_calls(module, batch_sizes: bool = False) -> list:
    """A list that grows by one entry at each call of the module."""
    calls = []
    # before, not after: recomputation in backward breaks off inside the last module it needs
    module.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0]) if batch_sizes else 1))
    return calls


def vision(model):
    return model.model.vision_embed_tokens


# Weights on disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["5GB", "100KB"], ids=["one file", "sharded"])
def test_saved_weights_load_bit_for_bit(dtype, shard, tmp_path):
    model = tiny.model().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 2) == (shard == "100KB")
    on_disk = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert on_disk.keys() == model.state_dict().keys()
    loaded, info = Phi3VForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == on_disk[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert torch.equal(on_disk[name], tensor), name
    assert torch.equal(loaded(**ONE_IMAGE).logits, model(**ONE_IMAGE).logits)


def test_alias_of_the_embeddings_in_a_checkpoint_is_no_unexpected_weight(tmp_path):
    """`wte` is in the official state_dict(), and some tools write it to disk."""
    model = tiny.model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    alias = {"model.vision_embed_tokens.wte.weight": weights["model.embed_tokens.weight"].clone()}
    save_file({**weights, **alias}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = Phi3VForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.state_dict().keys() == weights.keys()


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_auto_classes_load_a_folder_that_names_remote_code(auto_class, tmp_path):
    tiny.model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_phi3_v.Phi3VConfig",
        "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(auto_class.from_pretrained(tmp_path)) is Phi3VForCausalLM


def test_freshly_built_model_has_no_uninitialised_parameter():
    model = Phi3VForCausalLM(tiny.config())
    for name, tensor in model.named_parameters():
        assert tensor.isfinite().all(), name
        if tensor.ndim > 1:
            assert 1e-3 < tensor.std() < 1, name


# Images


def test_official_padded_layout_gives_the_same_result():
    model = tiny.model()
    batch = PROCESSOR("<|image_1|><|image_2|>", [tiny.picture(80, 40), WIDE])  # 2 + 1 and 4 + 1 crops
    counts = [1 + height * width // tiny.CROP**2 for height, width in batch["image_sizes"].tolist()]
    assert counts == [3, 5]
    # nan: what fills up an image must not even be looked at
    layout = torch.full((2, 6, 3, tiny.CROP, tiny.CROP), float("nan"))
    for image, crops in zip(layout, batch["pixel_values"].split(counts), strict=True):
        image[: len(crops)] = crops
    assert torch.equal(model(**{**batch, "pixel_values": layout}).logits, model(**batch).logits)


def test_only_real_crops_are_encoded_and_the_unused_layer_never_runs():
    model = tiny.model()
    clip = vision(model).img_processor.vision_model
    crops = count_calls(clip.embeddings, batch_sizes=True)
    layers = [count_calls(layer) for layer in clip.encoder.layers]
    norm = count_calls(clip.post_layernorm)
    model(**TWO_IMAGES)
    assert crops == [5 + 5]
    assert [len(calls) for calls in layers] == [1, 1, 0]
    assert not norm
    model(**SHORT_TEXT)
    assert crops == [5 + 5], "no image, nothing to encode"


def test_every_pixel_and_every_crop_reaches_its_own_image_tokens_only():
    model = tiny.model()
    before = vision(model)(TWO_IMAGES["pixel_values"], TWO_IMAGES["image_sizes"])
    assert before.shape == (27 + 25, 64)
    for crop in range(10):
        pixels = TWO_IMAGES["pixel_values"].clone()
        pixels[crop, 0, 13, 13] += 1
        changed = (vision(model)(pixels, TWO_IMAGES["image_sizes"]) != before).any(-1)
        assert changed.sum() == 4, "2 x 2 image tokens of the crop"
        assert changed[:27].any() == (crop < 5)


def test_image_features_take_the_places_of_the_image_tokens():
    model = tiny.model()
    seen = {}
    model.model.layers[0].register_forward_pre_hook(lambda _module, args: seen.update(embeddings=args[0][0]))
    model(**TWO_IMAGES)
    ids = TWO_IMAGES["input_ids"][0]
    is_image = ids == PROCESSOR.image_token_id
    features = vision(model)(TWO_IMAGES["pixel_values"], TWO_IMAGES["image_sizes"])
    assert torch.equal(seen["embeddings"][is_image], features)
    assert torch.equal(seen["embeddings"][~is_image], model.model.embed_tokens(ids[~is_image]))


@pytest.mark.parametrize("input_grads", [False, True], ids=["plain", "enable_input_require_grads"])
def test_frozen_tower_builds_no_graph_and_the_projector_still_learns(input_grads):
    model = tiny.model().train()
    vision(model).img_processor.requires_grad_(False)
    if input_grads:  # gradient checkpointing of an adapter asks for it, and it hooks CLIP's embeddings too
        model.enable_input_require_grads()
    outputs = []
    vision(model).img_processor.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    _, found = gradients(model, with_labels(ONE_IMAGE))
    assert outputs[0].grad_fn is None
    assert not outputs[0].requires_grad
    for name, gradient in found.items():
        if ".img_processor." in name:
            assert gradient is None, name
        else:
            assert gradient.any(), name


# Labels


def test_loss_is_that_of_all_logits_and_logits_are_computed_only_where_a_label_is():
    model = tiny.model()
    batch = padded([with_labels(row) for row in ROWS], "right")
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten())
    positions = count_calls(model.lm_head, batch_sizes=True)
    outputs = model(**batch)
    assert outputs.logits is None
    assert positions == [int((shifted != -100).sum())]
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("keep", "positions"), [(0, slice(None)), (3, slice(-3, None)), (torch.tensor([2, 5]), [2, 5])], ids=str
)
def test_logits_come_with_the_loss_where_they_are_asked_for(keep, positions):
    model = tiny.model()
    outputs = model(**with_labels(ONE_IMAGE), logits_to_keep=keep)
    torch.testing.assert_close(outputs.logits, model(**ONE_IMAGE).logits[:, positions], rtol=0, atol=1e-5)
    assert outputs.loss == model(**with_labels(ONE_IMAGE)).loss


@pytest.mark.parametrize("number", [10, torch.tensor(10)])
def test_loss_is_the_sum_over_num_items_in_batch(number):
    model = tiny.model()
    batch = with_labels(SHORT_TEXT)
    labels = int((batch["labels"][:, 1:] != -100).sum())
    found = model(**batch, num_items_in_batch=number).loss
    torch.testing.assert_close(found, model(**batch).loss * labels / 10)


def test_no_label_at_all_gives_loss_zero_and_finite_gradients():
    batch = {**ONE_IMAGE, "labels": torch.full_like(ONE_IMAGE["input_ids"], -100)}
    loss, found = gradients(tiny.model().train(), batch)
    assert loss == 0
    assert all(gradient is None or not gradient.any() for gradient in found.values())  # nan counts as any
    assert found["lm_head.weight"] is not None


# Batches: padding and packing never change a sample's result


@KERNELS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_give_the_logits_of_each_row_alone(side, attention):
    model = tiny.model(attention=attention)
    batch = padded(ROWS, side)
    logits = model(**batch).logits
    for row, mask, found in zip(ROWS, batch["attention_mask"].bool(), logits, strict=True):
        torch.testing.assert_close(found[mask], model(**row).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_packed"])
@pytest.mark.parametrize("cached", [False, True], ids=["prompt", "with a cache"])
def test_every_position_sees_a_key_and_tokens_see_what_they_saw(attention, cached):
    """Kernels disagree about softmax over nothing: nan in some, in others only in the backward pass."""
    model, masks = tiny.model(attention=attention), []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _module, _args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    batch = padded(ROWS, "left")
    is_token = batch["attention_mask"].bool()
    length = is_token.shape[1]
    assert not is_token[:, 0].all()
    past = model(**batch, use_cache=True).past_key_values
    keys, queries = is_token, is_token
    if cached:
        keys = torch.nn.functional.pad(is_token, (0, 1), value=True)
        queries = keys[:, -1:]
        model(input_ids=batch["input_ids"][:, -1:], attention_mask=keys.long(), past_key_values=past)
    found = masks[-1][:, 0]
    assert found.any(-1).all()
    causal = torch.ones(keys.shape[1], keys.shape[1]).tril()[-queries.shape[1] :].bool()
    expected = causal & keys[:, None, :]
    assert torch.equal(found[queries], expected[queries])
    assert found.shape == (len(ROWS), 1 if cached else length, keys.shape[1])


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_packed"])
def test_a_batch_without_padding_needs_no_mask(attention):
    model, masks = tiny.model(attention=attention), []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _module, _args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(**ONE_IMAGE)
    assert masks == [None], "so that the fast kernels are used"


@KERNELS
@pytest.mark.parametrize("layout", ["packed", "left", "right"])
def test_packed_and_padded_batches_give_the_loss_and_gradients_of_one_by_one(layout, attention):
    """Texts, one image, two images, and a row past the short rope, all in one batch."""
    model = tiny.model(attention=attention).train()
    rows = [with_labels(row) for row in ROWS]
    assert rows[-1]["input_ids"].shape[1] > tiny.LONG_AFTER > rows[0]["input_ids"].shape[1]
    number = sum(int((row["labels"] != -100).sum()) for row in rows)
    batch = packed(rows) if layout == "packed" else padded(rows, layout)
    expected_loss, expected = gradients(model, *rows, num_items_in_batch=number)
    loss, found = gradients(model, batch)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert_same_gradients(found, expected)


@KERNELS
def test_packed_rows_give_the_logits_of_each_row_alone(attention):
    model = tiny.model(attention=attention)
    expected = torch.cat([model(**row).logits for row in ROWS], 1)
    torch.testing.assert_close(model(**packed(ROWS), use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


def test_packed_rows_are_kept_apart_in_evaluation_without_being_asked():
    model = tiny.model()
    expected = torch.cat([model(**row).logits for row in ROWS], 1)
    torch.testing.assert_close(model(**packed(ROWS)).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_gradient_checkpointing_recomputes_both_towers_and_changes_nothing():
    batch = with_labels(TWO_IMAGES)
    model = tiny.model().train()
    expected_loss, expected = gradients(model, batch)
    model.gradient_checkpointing_enable()  # the only name that the oldest supported transformers has
    clip = count_calls(vision(model).img_processor.vision_model.encoder.layers[0].mlp)
    phi = count_calls(model.model.layers[0].mlp)
    loss, found = gradients(model, batch)
    assert (len(clip), len(phi)) == (2, 2), "forward, and once more in backward"
    assert loss == expected_loss
    assert_same_gradients(found, expected)


def test_text_only_batch_gives_every_used_vision_parameter_a_zero_gradient():
    """None would make ranks wait for each other for ever: one has an image in its batch, another has none."""
    model = tiny.model().train()
    with_image = gradients(model, with_labels(ONE_IMAGE))[1]
    loss, found = gradients(model, with_labels(SHORT_TEXT))
    assert loss == pytest.approx(model.eval()(**with_labels(SHORT_TEXT)).loss.item(), abs=1e-6)
    used = [name for name, gradient in with_image.items() if gradient is not None]
    assert sum(".vision_embed_tokens." in name for name in used) > 30
    for name in used:
        assert found[name] is not None, name
        assert bool(found[name].any()) == (".vision_embed_tokens." not in name), name


def test_text_only_batch_of_a_frozen_vision_part_encodes_nothing():
    model = tiny.model().train()
    vision(model).requires_grad_(False)
    calls = count_calls(vision(model))
    gradients(model, with_labels(SHORT_TEXT))
    assert not calls


# Rope


def official_rope(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own Phi3 rope, one sequence at a time."""
    values = tiny.config()
    config = Phi3Config(
        hidden_size=values.hidden_size,
        num_attention_heads=values.num_attention_heads,
        max_position_embeddings=values.max_position_embeddings,
        original_max_position_embeddings=values.original_max_position_embeddings,
        rope_parameters=values.rope_parameters,
        pad_token_id=0,
    )
    return Phi3RotaryEmbedding(config)(torch.zeros(1), positions)


LENGTHS = [1, 5, 63, 64, 65, 200]


def test_rope_of_each_row_is_that_of_the_row_alone():
    rope = Phi3VRotaryEmbedding(tiny.config())
    positions = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in zip(positions, LENGTHS, strict=True):
        row[:] = torch.arange(max(LENGTHS)).clamp(max=length - 1)  # as the model counts over a right-padded mask
    for found, expected in zip(
        rope(torch.zeros(1), positions),
        zip(*[official_rope(torch.arange(length)[None]) for length in LENGTHS], strict=True),
        strict=True,
    ):
        for row, alone, length in zip(found, expected, LENGTHS, strict=True):
            torch.testing.assert_close(row[:length], alone[0], rtol=0, atol=1e-6)


def test_rope_of_packed_sequences_is_that_of_each_alone():
    sequences = [torch.arange(length) for length in (5, 200, 1, 64, 65)]
    found = Phi3VRotaryEmbedding(tiny.config())(torch.zeros(1), torch.cat(sequences)[None])
    expected = [official_rope(sequence[None]) for sequence in sequences]
    for values, alone in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(values, torch.cat(alone, 1), rtol=0, atol=1e-6)


def test_long_and_short_rope_differ_as_soon_as_one_position_is_past_the_limit():
    short, long = (official_rope(torch.arange(length)[None])[0] for length in (64, 65))
    assert (long[:, :64] - short).abs().max() > 0.5, "else the two tests above would prove nothing"


def test_rope_stays_exact_when_the_model_is_cast_to_bfloat16():
    """DeepSpeed casts the module, buffers included; frequencies rounded to bfloat16 move logits by 0.3."""
    model = tiny.model()
    positions = torch.arange(200)[None]
    expected = model.model.rotary_emb(torch.zeros(1), positions)
    model.to(torch.bfloat16)
    for found, exact in zip(model.model.rotary_emb(torch.zeros(1), positions), expected, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, exact)
    rounded = model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), positions)
    for found, exact in zip(rounded, expected, strict=True):
        assert torch.equal(found, exact.bfloat16()), "rounded once, at the very end"


def test_rope_is_exact_under_autocast():
    rope = Phi3VRotaryEmbedding(tiny.config())
    positions = torch.arange(200)[None]
    expected = rope(torch.zeros(1), positions)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, rope(torch.zeros(1), positions), expected))


def test_model_without_rope_scaling_has_plain_rope():
    config = tiny.config(rope_scaling=None)
    positions = torch.arange(200)[None]
    found = Phi3VRotaryEmbedding(config)(torch.zeros(1), positions)
    angles = positions[0, :, None] * 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(found[0][0], torch.cat((angles, angles), -1).cos(), rtol=0, atol=1e-4)


# Errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"image_sizes": torch.tensor([[56, 56]])},
            ValueError,
            r"row 0 of input_ids holds 25 <\|image\|> tokens, its images give 27 features: expected the same number",
        ),
        (
            {"pixel_values": torch.zeros(5, 3, 28, 28, dtype=torch.uint8)},
            TypeError,
            "pixel_values are torch.uint8: expected floating point",
        ),
        (
            {"pixel_values": torch.zeros(5, 3, 56, 56)},
            ValueError,
            r"shape \(5, 3, 56, 56\): expected \(crops, 3, 28, 28\)",
        ),
        ({"pixel_values": torch.zeros(3, 28, 28)}, ValueError, r"shape \(3, 28, 28\): expected"),
        ({"image_sizes": None}, ValueError, "pixel_values without image_sizes: expected both"),
        (
            {"image_sizes": torch.tensor([[28, 100]])},
            ValueError,
            "image_sizes has 28 x 100 pixels: expected multiples of the crop size 28",
        ),
        ({"image_sizes": torch.tensor([[0, 28]])}, ValueError, "0 x 28 pixels: expected multiples"),
        ({"image_sizes": torch.tensor([[28, 56]])}, ValueError, "hold 5 crops: expected 3 for the image_sizes"),
        (
            {"pixel_values": torch.zeros(1, 4, 3, 28, 28)},
            ValueError,
            "hold 1 images of 4 crops: expected 1 images of at least 5 crops",
        ),
        (
            {"pixel_values": torch.zeros(2, 5, 3, 28, 28)},
            ValueError,
            "hold 2 images of 5 crops: expected 1 images of at least 5",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_both_numbers(changes, error, message):
    with pytest.raises(error, match=message):
        tiny.model()(**{**ONE_IMAGE, **changes})


def test_images_for_a_text_without_image_tokens_are_refused():
    with pytest.raises(ValueError, match=r"holds 0 <\|image\|> tokens, its images give 25 features"):
        tiny.model()(**{**ONE_IMAGE, **SHORT_TEXT})


def test_pixels_of_another_float_type_are_cast_to_that_of_the_model():
    model = tiny.model().bfloat16()
    half = {**ONE_IMAGE, "pixel_values": ONE_IMAGE["pixel_values"].bfloat16()}
    assert torch.equal(model(**ONE_IMAGE).logits, model(**half).logits)


def test_images_that_belong_to_another_row_are_refused_although_the_total_fits():
    model = tiny.model()
    batch = PROCESSOR(["<|image_1|>", "<|image_1|>"], [[WIDE], [SQUARE]], padding=True)
    batch["image_sizes"] = batch["image_sizes"].flip(0)
    with pytest.raises(
        ValueError, match=r"row 0 of input_ids holds \d+ <\|image\|> tokens, its images give \d+ features"
    ):
        model(**batch)


def test_image_tokens_without_pixel_values_are_refused():
    model = tiny.model()
    batch = PROCESSOR("<|image_1|>", SQUARE)
    with pytest.raises(ValueError, match="tokens without pixel_values: expected both"):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
