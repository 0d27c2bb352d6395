"""generate(): batches, beams, images, the cache, the change from short to long rope, and where it stops."""

import json

import pytest
import tiny
import torch
from transformers import LogitsProcessor

from phi3v import Phi3VForCausalLM

PROCESSOR = tiny.processor(num_crops=2)
WIDE, SQUARE = tiny.picture(80, 20, 1), tiny.picture(30, 30, 2)  # 2 + 1 and 1 + 1 crops, 17 and 13 image tokens
TEXTS = ["<|image_1|> what?", "hello you", "<|image_2|> and <|image_1|>"]
IMAGES = [[WIDE], [], [SQUARE, WIDE]]
IMAGE = PROCESSOR.image_token_id
PAD, END = PROCESSOR.tokenizer.pad_token_id, PROCESSOR.tokenizer.convert_tokens_to_ids("<|end|>")


def generate(model, texts, images=None, **kwargs):
    """New ids and logits, (B, new tokens) and (B, new tokens, V); 8 tokens by default, never stopped early.

    Random weights may well choose `<|image|>`, which no trained model does: it is ruled out.
    """
    batch = PROCESSOR(texts, images, padding=True, padding_side="left")
    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [IMAGE], **kwargs}
    model.generation_config.eos_token_id = None
    outputs = model.generate(**batch, **settings, output_logits=True, return_dict_in_generate=True)
    return outputs.sequences[:, batch["input_ids"].shape[1] :], torch.stack(outputs.logits, 1)


def choose(logits: torch.Tensor) -> torch.Tensor:
    return logits.index_fill(-1, torch.tensor([IMAGE]), -torch.inf).argmax(-1)


def greedy_without_generate(model, text, images=None, steps: int = 8) -> torch.Tensor:
    """Logits of greedy decoding, the whole text run again at each step."""
    batch = PROCESSOR(text, images)
    images = {key: value for key, value in batch.items() if key in ("pixel_values", "image_sizes")}
    ids, logits = batch["input_ids"], []
    for _ in range(steps):
        with torch.no_grad():
            logits.append(model(input_ids=ids, **images).logits[:, -1])
        ids = torch.cat([ids, choose(logits[-1])[:, None]], 1)
    return torch.stack(logits, 1)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "sdpa_packed"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_batch_gives_what_each_row_gives_alone(attention, use_cache):
    model = tiny.model(attention=attention)
    ids, logits = generate(model, TEXTS, IMAGES, use_cache=use_cache)
    for row, (text, images) in enumerate(zip(TEXTS, IMAGES, strict=True)):
        expected = greedy_without_generate(model, text, images)[0]
        assert ids[row].tolist() == choose(expected).tolist()
        torch.testing.assert_close(logits[row], expected, rtol=1e-5, atol=1e-5)
    assert len({tuple(row) for row in ids.tolist()}) == 3, "rows that all say the same would prove nothing"


def test_cached_steps_run_one_token_and_no_image():
    model = tiny.model()
    lengths, crops = [], []
    model.model.layers[0].register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[1]))
    model.model.vision_embed_tokens.register_forward_pre_hook(lambda _module, args: crops.append(len(args[0])))
    generate(model, TEXTS, IMAGES)
    assert lengths[1:] == [1] * 7
    assert crops == [3 + 2 + 3]


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_of_a_batch_give_what_each_row_gives_alone(use_cache):
    model = tiny.model()
    found = generate(model, TEXTS, IMAGES, num_beams=3, use_cache=use_cache)[0]
    for row, text, images in zip(found, TEXTS, IMAGES, strict=True):
        alone = generate(model, text, images or None, num_beams=3, use_cache=use_cache)[0]
        assert row.tolist() == alone[0].tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_scores_of_the_beams_are_those_of_the_same_answers_read_in_one_piece(use_cache):
    """Beams that saw another row's images, or another beam's cache, would score something else."""
    model = tiny.model()
    batch = PROCESSOR(TEXTS, IMAGES, padding=True, padding_side="left")
    outputs = model.generate(
        **batch,
        max_new_tokens=8,
        num_beams=4,
        length_penalty=0.0,  # the plain sum of the log-likelihoods
        use_cache=use_cache,
        suppress_tokens=[PAD, END, IMAGE],
        output_scores=True,
        return_dict_in_generate=True,
    )
    new = outputs.sequences[:, batch["input_ids"].shape[1] :]
    assert len({tuple(row) for row in new.tolist()}) == 3
    for answer, score, text, images in zip(new, outputs.sequences_scores, TEXTS, IMAGES, strict=True):
        row = PROCESSOR(text, images or None)
        row["input_ids"] = torch.cat([row["input_ids"], answer[None]], 1)
        del row["attention_mask"]
        assert row["input_ids"].shape[1] <= tiny.LONG_AFTER
        with torch.no_grad():
            likelihood = model(**row).logits[0, -9:-1].log_softmax(-1).gather(-1, answer[:, None]).sum()
        torch.testing.assert_close(score, likelihood, rtol=1e-5, atol=1e-5)


def test_several_answers_of_one_prompt_keep_their_images():
    model = tiny.model()
    answers = generate(model, TEXTS, IMAGES, num_beams=3, num_return_sequences=3)[0].view(3, 3, -1)
    best = generate(model, TEXTS, IMAGES, num_beams=3)[0]
    assert torch.equal(answers[:, 0], best)
    assert all(len({tuple(answer) for answer in row.tolist()}) == 3 for row in answers)


def test_beams_refuse_image_tokens_that_are_not_those_of_the_rows_own_images():
    model = tiny.model()
    batch = PROCESSOR(["<|image_1|>", "<|image_1|>"], [[WIDE], [SQUARE]], padding=True, padding_side="left")
    batch["image_sizes"] = batch["image_sizes"].flip(0)  # the total number of features still fits
    with pytest.raises(
        ValueError,
        match=r"row 0 of input_ids holds 17 <\|image\|> tokens, its images give \d+ features: expected the same",
    ):
        model.generate(**batch, num_beams=2, max_new_tokens=2)


class Force(LogitsProcessor):
    """Makes each row say one token at one step, and never by itself stop elsewhere."""

    def __init__(self, prompt_length: int, script: dict[tuple[int, int], int]):
        self.prompt_length, self.script = prompt_length, script

    def __call__(self, input_ids, scores):
        scores[:, [PAD, END]] = -torch.inf
        for (row, step), token in self.script.items():
            if input_ids.shape[1] - self.prompt_length == step:
                scores[row] = -torch.inf
                scores[row, token] = 0
        return scores


@pytest.mark.parametrize("last", [PAD, END], ids=["endoftext", "end"])
def test_generation_stops_at_end_and_at_endoftext_and_pads_the_finished_row(last):
    model = tiny.model()
    batch = PROCESSOR(TEXTS, IMAGES, padding=True, padding_side="left")
    length = batch["input_ids"].shape[1]
    script = Force(length, {(0, 4): last, (1, 1): last, (2, 2): END})
    ids = model.generate(**batch, max_new_tokens=20, do_sample=False, logits_processor=[script])[:, length:]
    assert ids.shape[1] == 5, "as long as the longest row, which says its last token at step 4"
    assert ids[0, 4] == last
    assert ids[1, 1:].tolist() == [last, PAD, PAD, PAD]
    assert ids[2, 2:].tolist() == [END, PAD, PAD]


def test_loaded_model_stops_too_where_the_official_generation_config_names_another_token(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    # Source: microsoft/Phi-3.5-vision-instruct (generation_config.json); `</s>` is never written by the model
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1}))
    for loaded in (
        Phi3VForCausalLM.from_pretrained(tmp_path),
        Phi3VForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[0],
    ):
        assert loaded.generation_config.eos_token_id == [END, PAD]
        assert loaded.generation_config.pad_token_id == PAD


def text_of(tokens: int) -> str:
    text = "x" * (tokens - 2)
    assert PROCESSOR(text)["input_ids"].shape == (1, tokens)
    return text


CROSSING = [
    ("becomes long", text_of(60), None),
    ("stays short", text_of(20), None),
    ("is long from the start", text_of(70), None),
    ("becomes long, with an image", "<|image_1|> " + "x" * 35, [WIDE]),
]


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_that_grow_past_the_short_rope_and_rows_that_do_not_share_a_batch(use_cache):
    model = tiny.model()
    names, texts, images = zip(*CROSSING, strict=True)
    lengths = [PROCESSOR(text, image)["input_ids"].shape[1] for text, image in zip(texts, images, strict=True)]
    assert [length <= tiny.LONG_AFTER < length + 12 for length in lengths] == [True, False, False, True]
    ids, logits = generate(model, list(texts), list(images), max_new_tokens=12, use_cache=use_cache)
    for row, name in enumerate(names):
        expected = greedy_without_generate(model, texts[row], images[row], steps=12)[0]
        torch.testing.assert_close(logits[row], expected, rtol=1e-5, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")
        assert ids[row].tolist() == choose(expected).tolist()


def test_beams_cross_the_change_of_rope_too():
    model = tiny.model()
    settings = {"max_new_tokens": 12, "num_beams": 3}
    found = generate(model, [CROSSING[0][1], CROSSING[1][1]], **settings)[0]
    assert found.tolist() == generate(model, [CROSSING[0][1], CROSSING[1][1]], **settings, use_cache=False)[0].tolist()


@pytest.mark.parametrize(("text", "use_cache"), [("<|image_1|> what?", False), (CROSSING[3][1], True)])
def test_generated_image_token_does_not_break_generation(text, use_cache):
    """Random or badly trained weights, or a high temperature, can choose `<|image|>`; it must not crash an evaluation."""
    model = tiny.model()
    favour = torch.zeros(model.config.vocab_size).index_fill(0, torch.tensor([IMAGE]), 100.0)
    model.lm_head.register_forward_hook(lambda _module, _args, logits: logits + favour)
    batch = PROCESSOR(text, WIDE)
    ids = model.generate(**batch, max_new_tokens=12, do_sample=False, use_cache=use_cache)
    assert ids.shape[1] > batch["input_ids"].shape[1]


# Other ways through generate()


def greedy(model, batch: dict, **kwargs) -> list[list[int]]:
    """New ids of greedy decoding, never stopped early."""
    model.generation_config.eos_token_id = None
    given = batch["input_ids"].shape[1] if "input_ids" in batch else 0
    return model.generate(**batch, **{"max_new_tokens": 12, "do_sample": False, **kwargs})[:, given:].tolist()


PROMPTS = {
    "images": ("<|image_1|> what is it, <|image_2|>?", [WIDE, SQUARE]),
    "text": ("hello", None),
    "long from the start": ("<|image_1|> " + "x" * 50, [WIDE]),
    "becomes long": ("<|image_1|> " + "x" * 35, [WIDE]),
}
WITH_PROMPTS = pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
# Several tokens are judged at once; greedy decoding judges those up to the limit by the short factors.
WITHOUT_CROSSING = pytest.mark.parametrize("prompt", list(PROMPTS.values())[:3], ids=list(PROMPTS)[:3])
CROSSES = "take a text of .* tokens past 64, where other rope factors begin: expected a text that is read in one piece"


@WITHOUT_CROSSING
@pytest.mark.parametrize("seed", [0, 1], ids=["always right", "mostly wrong"])
def test_an_assistant_model_changes_no_token(prompt, seed):
    model, batch = tiny.model(), PROCESSOR(*prompt)
    expected = greedy(model, batch)
    assistant, crops = tiny.model(seed=seed), []
    assistant.generation_config.eos_token_id = None
    assistant.model.vision_embed_tokens.register_forward_pre_hook(lambda _module, args: crops.append(len(args[0])))
    assert greedy(model, batch, assistant_model=assistant) == expected
    assert bool(crops) == (prompt[1] is not None), "it looks at the images as well"


@WITHOUT_CROSSING
def test_candidates_looked_up_in_the_prompt_change_no_token(prompt):
    model, batch = tiny.model(), PROCESSOR(*prompt)
    assert greedy(model, batch, prompt_lookup_num_tokens=3) == greedy(model, batch)


def test_candidates_past_the_short_rope_are_refused():
    model, batch = tiny.model(), PROCESSOR(*PROMPTS["becomes long"])
    with pytest.raises(ValueError, match=CROSSES):
        greedy(model, batch, assistant_model=tiny.model())
    with pytest.raises(ValueError, match=CROSSES):
        greedy(model, batch, prompt_lookup_num_tokens=3)


def test_a_cache_that_is_continued_past_the_short_rope_is_read_again():
    model = tiny.model()
    text = "x" * 40
    first = model.generate(**PROCESSOR(text), max_new_tokens=4, return_dict_in_generate=True, do_sample=False)
    longer = torch.cat([first.sequences, PROCESSOR("y" * 30)["input_ids"]], 1)
    batch = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    assert greedy(model, {**batch, "past_key_values": first.past_key_values}) == greedy(model, batch)


def embedded(model, batch: dict) -> torch.Tensor:
    """The prompt as the user of inputs_embeds makes it: features in the place of the image tokens."""
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    if "pixel_values" not in batch:
        return embeddings
    features = model.model.vision_embed_tokens(batch["pixel_values"], batch["image_sizes"])
    return embeddings.masked_scatter((batch["input_ids"] == IMAGE)[..., None], features)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("with_ids", [True, False], ids=["with ids", "embeddings alone"])
@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "no mask"])
@WITH_PROMPTS
def test_a_prompt_of_embeddings_gives_the_tokens_of_its_ids(prompt, with_ids, with_mask, use_cache):
    model, batch = tiny.model(), PROCESSOR(*prompt)
    expected = greedy(model, batch)
    given = {"inputs_embeds": embedded(model, batch)}
    given |= {"input_ids": batch["input_ids"]} if with_ids else {}
    given |= {"attention_mask": batch["attention_mask"]} if with_mask else {}
    assert greedy(model, given, use_cache=use_cache) == expected


def test_a_padded_batch_of_embeddings_gives_the_tokens_of_its_ids():
    model = tiny.model()
    texts, images = zip(*PROMPTS.values(), strict=True)
    batch = PROCESSOR(list(texts), list(images), padding=True, padding_side="left")
    given = {"inputs_embeds": embedded(model, batch), "attention_mask": batch["attention_mask"]}
    assert greedy(model, given) == greedy(model, batch)


def test_embeddings_and_pixels_together_are_refused():
    model, batch = tiny.model(), PROCESSOR(*PROMPTS["images"])
    with pytest.raises(ValueError, match="inputs_embeds and pixel_values: expected one of them"):
        greedy(model, {**batch, "inputs_embeds": embedded(model, batch)})


@pytest.mark.parametrize("chunk", [1, 5, 19, 100])
def test_a_text_read_in_chunks_gives_the_same_tokens(chunk):
    model, batch = tiny.model(), PROCESSOR("x" * 18)
    assert greedy(model, batch, prefill_chunk_size=chunk) == greedy(model, batch)


@pytest.mark.parametrize("chunk", [5, 20])
def test_images_are_not_read_in_chunks(chunk):
    # by transformers itself, or by the count of the tokens where it is older
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        greedy(tiny.model(), PROCESSOR(*PROMPTS["images"]), prefill_chunk_size=chunk)


def test_a_text_past_the_short_rope_is_not_read_in_chunks():
    """The first chunk would be rotated by the short factors, the last by the long ones."""
    with pytest.raises(ValueError, match=CROSSES):
        greedy(tiny.model(), PROCESSOR(text_of(70)), prefill_chunk_size=30)
    assert greedy(tiny.model(), PROCESSOR(text_of(70)), prefill_chunk_size=70) == greedy(
        tiny.model(), PROCESSOR(text_of(70))
    )
