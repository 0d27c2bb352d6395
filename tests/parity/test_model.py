"""Phi3VForCausalLM against the official model: every recorded number of 12 forward and 2 backward passes."""

import numpy as np
import pytest
import torch
from golden import (
    GRADIENT_BOUND,
    LOGIT_BOUND,
    ROUNDING_BOUND,
    arrays,
    case,
    check,
    input_ids,
    manifest,
    names,
    pixels,
)

FORWARD = names("model_forward")
GRADIENTS = [name for name in FORWARD if case("model_forward", name).get("grad")]
SDPA = ["text_only", "batch3_text_img", "long_4097", "pixels_3x1_1x2_nc4"]


def batch(name: str) -> dict[str, torch.Tensor]:
    recorded = arrays("model_forward")
    return {
        "input_ids": input_ids(recorded[f"{name}/input_ids"]),
        "attention_mask": torch.from_numpy(recorded[f"{name}/attention_mask"].astype(np.int64)),
        "labels": torch.from_numpy(recorded[f"{name}/labels"].astype(np.int64)),
        **pixels(case("model_forward", name)),
    }


def test_golden_parameters_are_those_of_the_recipe(golden_model):
    recorded = manifest("param_check")
    parameters = dict(golden_model.named_parameters())
    assert parameters.keys() == recorded.keys()
    for name, tensor in parameters.items():
        assert list(tensor.shape) == recorded[name]["shape"], name
        assert tensor.flatten()[:4].tolist() == recorded[name]["first4"], name
        assert float(tensor.detach().double().sum()) == pytest.approx(recorded[name]["sum"], rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize(
    ("name", "attention"), [(name, "eager") for name in FORWARD] + [(name, "sdpa") for name in SDPA]
)
def test_forward_gives_the_official_numbers(name, attention, golden_model, record_property):
    golden_model.set_attn_implementation(attention)
    towers = [golden_model.model.layers[0].self_attn, golden_model.model.vision_embed_tokens.img_processor.vision_model]
    assert [tower.config._attn_implementation for tower in towers] == [attention, attention]
    seen = {}
    hooks = [
        golden_model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.update(embeds=args[0])),
        golden_model.model.vision_embed_tokens.img_processor.register_forward_hook(
            lambda _module, _args, output: seen.update(clip=output)
        ),
    ]
    with torch.no_grad():
        inputs = batch(name)
        outputs = golden_model(**inputs, logits_to_keep=0)
    for hook in hooks:
        hook.remove()

    recorded = arrays("model_forward")

    def check_against(key, found, where=..., bound=LOGIT_BOUND):
        check(record_property, f"{key}, {attention}", found[where], recorded[f"{name}/{key}"][where], bound)

    logits = outputs.logits
    length = inputs["input_ids"].shape[1]
    is_token = inputs["attention_mask"].bool().numpy()  # what is recorded at padding means nothing
    check_against("loss", outputs.loss)
    normaliser = logits.logsumexp(-1)
    check_against("logsumexp", normaliser, is_token)
    best = logits.topk(2).values
    margin = recorded[f"{name}/margin"]
    check_against("margin", best[..., 0] - best[..., 1], is_token, 2 * LOGIT_BOUND)  # two logits
    clear = is_token & (margin > 1e-4)
    assert (logits.argmax(-1).numpy() == recorded[f"{name}/argmax"])[clear].all()
    labels = inputs["labels"][:, 1:]
    of_label = logits[:, :-1].gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    check_against("nll", (normaliser[:, :-1] - of_label).where(labels >= 0, 0))
    lengths = inputs["attention_mask"].sum(-1).tolist()
    last = torch.stack([row[end - 16 : end, :64] for row, end in zip(logits, lengths, strict=True)])
    check_against("last16_first64", last)
    positions = [(j * (length - 1)) // 15 for j in range(16)]
    words = [(k * 1009 + 17) % 32064 for k in range(32)]
    check_against("spread_logits", logits[:, positions][..., words], is_token[:, positions])
    if "pixel_values" in inputs:
        positions = [(j * (length - 1)) // 63 for j in range(64)]
        check_against("embeds", seen["embeds"][:, positions][..., [0, 1, 95, 191]], is_token[:, positions])
        found = seen["clip"][:, [(j * 575) // 15 for j in range(16)]][..., [0, 1, 511, 1023]]
        # The official tower also runs over the empty crops that fill up an image; they are left out here.
        counts = [1 + height * width // 336**2 for height, width in inputs["image_sizes"].tolist()]
        features = recorded[f"{name}/clip_feat"]
        expected = np.concatenate([image[:count] for image, count in zip(features, counts, strict=True)])
        check(record_property, f"clip_feat, {attention}", found, expected)


@pytest.mark.parametrize("name", GRADIENTS)
def test_backward_gives_the_official_gradients(name, golden_model, record_property):
    golden_model.train()  # no dropout anywhere
    outputs = golden_model(**batch(name))
    check(record_property, "loss, training", outputs.loss.item(), case("model_forward", name)["loss"])
    outputs.loss.backward()

    recorded = arrays("model_grads")
    gradients = {key: tensor.grad for key, tensor in golden_model.named_parameters()}
    without = {key for key, gradient in gradients.items() if gradient is None}
    assert without == set(case("model_forward", name)["grad_none"])
    assert {
        key.split("/")[1] for key in recorded.files if key.startswith(f"{name}/model.")
    } <= gradients.keys() - without
    total = float(recorded[f"{name}/total_norm"])
    found = sum(gradient.double().square().sum() for gradient in gradients.values() if gradient is not None).sqrt()
    check(record_property, "gradients: total norm, relative", float(found) / total, 1.0, GRADIENT_BOUND)
    for key in gradients.keys() - without:
        norm, values = float(recorded[f"{name}/{key}/norm"]), recorded[f"{name}/{key}/val"]
        found = float(gradients[key].double().norm())
        entries = gradients[key].flatten()[torch.from_numpy(recorded[f"{name}/{key}/idx"])].numpy()
        if norm > ROUNDING_BOUND * total:
            check(record_property, "gradients: norm, relative", found / norm, 1.0, GRADIENT_BOUND)
            check(record_property, "gradients: entries / norm", entries / norm, values / norm, GRADIENT_BOUND)
        else:  # such as key biases, whose gradient is zero but for rounding
            check(record_property, "gradients: rounding / total norm", found / total, norm / total, ROUNDING_BOUND)
    assert not gradients["model.embed_tokens.weight"][32000].any(), "the padding row learns nothing"
