"""Phi3VProcessor with the small tokenizer of the demo, which has the official special tokens."""

import base64
import json
import random
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import AutoProcessor, PreTrainedTokenizerFast

import phi3v
from phi3v import Phi3VImageProcessor, Phi3VProcessor
from phi3v.processing_phi3_v import find_tags

PROCESSOR = tiny.processor()
IMAGE, PAD = PROCESSOR.image_token_id, PROCESSOR.tokenizer.pad_token_id
WIDE, TALL, SQUARE = tiny.picture(80, 20, 1), tiny.picture(20, 80, 2), tiny.picture(30, 30, 3)
TOKENS = {id(image): PROCESSOR.image_processor(image)["num_img_tokens"][0] for image in (WIDE, TALL, SQUARE)}


def ids(text: str) -> list[int]:
    return PROCESSOR.tokenizer(text).input_ids


def expanded(*parts) -> list[int]:
    """Ids of texts and images in turn; an image stands for its image tokens."""
    return [token for part in parts for token in (ids(part) if isinstance(part, str) else [IMAGE] * TOKENS[id(part)])]


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def crops(*images):
    return torch.cat([PROCESSOR.image_processor(image)["pixel_values"] for image in images])


def test_the_three_images_of_this_file_have_different_token_counts():
    assert len(set(TOKENS.values())) == 3


def test_a_tag_becomes_the_tokens_of_its_image_and_text_after_it_starts_with_bos():
    features = PROCESSOR("a <|image_1|> b", WIDE)
    assert features["input_ids"].tolist() == [expanded("a ", WIDE, " b")]
    assert ids(" b")[0] == PROCESSOR.tokenizer.bos_token_id
    assert features["attention_mask"].all()
    assert features["input_ids"].dtype == features["attention_mask"].dtype == torch.int64
    assert torch.equal(features["pixel_values"], crops(WIDE))
    assert features["image_sizes"].tolist() == [[28, 112]]


def test_the_number_of_a_tag_picks_its_image_not_its_place():
    features = PROCESSOR("x <|image_2|> y <|image_1|>", [WIDE, TALL])
    assert features["input_ids"].tolist() == [expanded("x ", TALL, " y ", WIDE, "")]
    assert torch.equal(features["pixel_values"], crops(TALL, WIDE))
    assert features["image_sizes"].tolist() == [[112, 28], [28, 112]]


def test_a_repeated_tag_repeats_its_image():
    features = PROCESSOR("<|image_1|><|image_2|><|image_1|>", [WIDE, TALL])
    assert features["input_ids"].tolist() == [expanded("", WIDE, "", TALL, "", WIDE, "")]
    assert torch.equal(features["pixel_values"], crops(WIDE, TALL, WIDE))


def test_more_than_nine_images_keep_their_order():
    images = [tiny.picture(30, 30, seed) for seed in range(12)]
    features = PROCESSOR("".join(f"<|image_{number}|>" for number in range(1, 13)), images)
    assert torch.equal(features["pixel_values"], crops(*images))


@pytest.mark.parametrize(
    ("text", "number", "message"),
    [
        ("<|image_2|>", 1, r"image tags <\|image_2\|> for 1 image\(s\): expected <\|image_1\|> to <\|image_1\|>"),
        ("<|image_0|>", 1, r"image tags <\|image_0\|> for 1 image"),
        ("<|image_1|><|image_3|>", 2, r"<\|image_1\|>, <\|image_3\|> for 2 image\(s\): expected .* <\|image_2\|>"),
        ("<|image_1|>", 2, r"<\|image_1\|> for 2 image"),
        ("<|image_1|><|image_2|>", 1, r"<\|image_1\|>, <\|image_2\|> for 1 image"),
        ("<|image_1|>", 0, r"<\|image_1\|> for 0 image\(s\): expected no image tag"),
        ("hello", 1, r"image tags none for 1 image"),
    ],
)
def test_tags_that_do_not_name_the_images_are_refused(text, number, message):
    with pytest.raises(ValueError, match=message):
        find_tags(text, number)
    with pytest.raises(ValueError, match=message):
        PROCESSOR(text, [SQUARE] * number)


def test_text_without_images_has_no_pixels():
    features = PROCESSOR("hello")
    assert features.keys() == {"input_ids", "attention_mask"}
    assert features["input_ids"].tolist() == [ids("hello")]


def test_images_may_be_one_a_list_or_a_list_of_lists():
    expected = PROCESSOR("<|image_1|>", [WIDE])
    for images in (WIDE, (WIDE,), [[WIDE]], np.asarray(WIDE)):
        assert same(PROCESSOR("<|image_1|>", images), expected)
    assert same(PROCESSOR(["<|image_1|>"], [[WIDE]]), expected)


TEXTS = ["<|image_1|> what?", "no image at all", "<|image_2|> and <|image_1|>"]
NESTED = [[WIDE], [], [TALL, SQUARE]]
ROWS = [expanded("", WIDE, " what?"), ids("no image at all"), expanded("", SQUARE, " and ", TALL, "")]


@pytest.mark.parametrize(
    "images",
    [NESTED, [[WIDE], None, (TALL, SQUARE)], [WIDE, None, [TALL, SQUARE]], [WIDE, TALL, SQUARE]],
    ids=["nested", "None for no image", "bare image", "flat, dealt out by the tags"],
)
def test_every_layout_of_a_batch_of_images_gives_the_same_batch(images):
    features = PROCESSOR(TEXTS, images, padding=True)
    for row, mask, expected in zip(features["input_ids"], features["attention_mask"], ROWS, strict=True):
        assert row[mask.bool()].tolist() == expected
    assert torch.equal(features["pixel_values"], crops(WIDE, SQUARE, TALL))
    assert features["image_sizes"].tolist() == [[28, 112], [56, 56], [112, 28]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_fills_the_side_asked_for_and_masks_it(side):
    features = PROCESSOR(TEXTS, NESTED, padding=True, padding_side=side)
    length = max(map(len, ROWS))
    for row, mask, expected in zip(features["input_ids"], features["attention_mask"], ROWS, strict=True):
        fill = [PAD] * (length - len(expected))
        zeros, ones = [0] * len(fill), [1] * len(expected)
        assert row.tolist() == (fill + expected if side == "left" else expected + fill)
        assert mask.tolist() == (zeros + ones if side == "left" else ones + zeros)


def test_padding_to_a_given_length_never_cuts():
    features = PROCESSOR("hello", padding="max_length", max_length=50)
    assert features["input_ids"].shape == (1, 50)
    assert PROCESSOR("hello", padding="max_length", max_length=3)["input_ids"].tolist() == [ids("hello")]


def test_pad_token_inside_the_text_is_not_masked():
    features = PROCESSOR("a<|endoftext|>b")
    assert PAD in features["input_ids"][0]
    assert features["attention_mask"].all()


def test_texts_of_unequal_length_want_padding_or_lists():
    with pytest.raises(ValueError, match="texts of 3 to 6 tokens: expected padding=True"):
        PROCESSOR(["hi", "four"])
    assert PROCESSOR(["hi", "four"], return_tensors=None)["input_ids"] == [ids("hi"), ids("four")]


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        (TEXTS, [[WIDE], []], r"2 list\(s\) of images for 3 text\(s\): expected one for each text"),
        (TEXTS, [WIDE, TALL], r"2 image\(s\) for 3 image tag\(s\) in 3 text\(s\)"),
        (TEXTS, [[WIDE, TALL], [], [SQUARE]], "for 2 image"),
    ],
)
def test_images_that_do_not_fit_the_texts_are_refused(texts, images, message):
    with pytest.raises(ValueError, match=message):
        PROCESSOR(texts, images, padding=True)


def test_num_crops_can_be_set_for_one_call():
    few, many = (PROCESSOR("<|image_1|>", SQUARE, num_crops=number) for number in (1, 9))
    assert (few["image_sizes"].tolist(), many["image_sizes"].tolist()) == ([[28, 28]], [[84, 84]])
    assert (len(few["pixel_values"]), len(many["pixel_values"])) == (2, 10)
    assert int((many["input_ids"] == IMAGE).sum()) == 10 * 4 + 1 + 4 * 2
    with pytest.raises(ValueError, match="num_crops is 17"):
        PROCESSOR("<|image_1|>", SQUARE, num_crops=17)


def test_numpy_tensors_on_request():
    features = PROCESSOR("<|image_1|>", SQUARE, return_tensors="np")
    assert {type(value) for value in features.values()} == {np.ndarray}


def chat(*contents) -> list[dict]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def test_chat_template_with_strings_is_the_official_text():
    prompt = PROCESSOR.apply_chat_template(chat("<|image_1|>\nWhat?", "A cat.", "Sure?"), add_generation_prompt=True)
    assert prompt == (
        "<|user|>\n<|image_1|>\nWhat?<|end|>\n<|assistant|>\nA cat.<|end|>\n<|user|>\nSure?<|end|>\n<|assistant|>\n"
    )


def test_generation_prompt_only_where_it_is_asked_for_and_the_user_spoke_last():
    assert PROCESSOR.apply_chat_template(chat("Hi")) == "<|user|>\nHi<|end|>\n"
    answered = PROCESSOR.apply_chat_template(chat("Hi", "Hello"), add_generation_prompt=True)
    assert answered == "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"


def test_content_parts_give_the_text_of_the_strings_with_tags_counted_over_the_turns():
    image = {"type": "image"}
    parts = chat(
        [image, image, {"type": "text", "text": "Same?"}],
        [{"type": "text", "text": "No."}],
        [image, {"type": "text", "text": "And now?"}],
    )
    strings = chat("<|image_1|>\n<|image_2|>\nSame?", "No.", "<|image_3|>\nAnd now?")
    assert PROCESSOR.apply_chat_template(parts) == PROCESSOR.apply_chat_template(strings)


def test_unknown_content_part_is_refused():
    with pytest.raises(Exception, match="content part of type 'video': expected 'text', 'image' or 'image_url'"):
        PROCESSOR.apply_chat_template(chat([{"type": "video"}]))


def test_chat_template_can_tokenize_at_once():
    messages = chat([{"type": "image", "image": WIDE}, {"type": "text", "text": "What?"}])
    features = PROCESSOR.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    prompt = PROCESSOR.apply_chat_template(messages, add_generation_prompt=True)
    assert same(features, PROCESSOR(prompt, WIDE))


def test_tokenizer_without_image_token_is_refused():
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"<unk>": 0}, [])), unk_token="<unk>")
    with pytest.raises(ValueError, match=r"the tokenizer has no token <\|image\|>"):
        Phi3VProcessor(Phi3VImageProcessor(), other)


def test_saved_processor_is_the_same_when_loaded(tmp_path):
    PROCESSOR.save_pretrained(tmp_path)
    expected = PROCESSOR("<|image_1|> what?", WIDE)
    for loaded in (Phi3VProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is Phi3VProcessor
        assert type(loaded.image_processor) is Phi3VImageProcessor
        assert same(loaded("<|image_1|> what?", WIDE), expected)
        assert loaded.apply_chat_template(chat("Hi")) == PROCESSOR.apply_chat_template(chat("Hi"))


def test_preprocessor_config_is_written_too_and_enough_by_itself(tmp_path):
    PROCESSOR.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (written["num_crops"], written["crop_size"], written["num_img_tokens"]) == (4, 28, 4)
    (tmp_path / "processor_config.json").unlink()
    assert Phi3VImageProcessor.from_pretrained(tmp_path).to_dict() == PROCESSOR.image_processor.to_dict()


def test_official_folder_layout_loads_without_remote_code(tmp_path):
    """Tokenizer files, preprocessor_config.json and a processor_config.json that name remote code."""
    PROCESSOR.tokenizer.save_pretrained(tmp_path)
    tiny.config().save_pretrained(tmp_path)
    auto_map = {name: f"processing_phi3_v.Phi3V{name[4:]}" for name in ("AutoProcessor", "AutoImageProcessor")}
    preprocessor = {"auto_map": auto_map, "image_processor_type": "Phi3VImageProcessor", "num_crops": 4}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**preprocessor, "processor_class": "Phi3VProcessor", "num_img_tokens": 144})
    )
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"auto_map": {"AutoProcessor": auto_map["AutoProcessor"]}, "processor_class": "Phi3VProcessor"})
    )
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, phi3v.Phi3VProcessor)
    assert (loaded.image_processor.crop_size, loaded.image_processor.num_img_tokens) == (336, 144)


def test_ids_of_each_image_stand_in_one_run():
    is_image = PROCESSOR("<|image_1|><|image_2|>", [WIDE, TALL])["input_ids"][0] == IMAGE
    runs = [len(list(run)) for value, run in groupby(is_image.tolist()) if value]
    assert runs == [TOKENS[id(WIDE)], TOKENS[id(TALL)]]


# Keywords that other libraries pass


@pytest.mark.parametrize("truncation", [False, None, "do_not_truncate", True, "longest_first"])
def test_a_text_that_fits_is_the_same_whatever_truncation_says(truncation):
    expected = PROCESSOR(TEXTS, NESTED, padding=True)
    longest = expected["input_ids"].shape[1]
    assert same(PROCESSOR(TEXTS, NESTED, padding=True, truncation=truncation, max_length=longest), expected)
    assert same(PROCESSOR(TEXTS, NESTED, padding=True, truncation=truncation), expected)


@pytest.mark.parametrize("truncation", [True, "longest_first", "only_first"])
def test_truncation_of_a_text_that_does_not_fit_is_refused(truncation):
    longest = max(map(len, ROWS))
    with pytest.raises(
        ValueError, match=f"a text of {longest} tokens: expected at most max_length {longest - 1}"
    ) as error:
        PROCESSOR(TEXTS, NESTED, padding=True, truncation=truncation, max_length=longest - 1)
    assert "\n" not in str(error.value)
    for off in (False, None, "do_not_truncate"):
        assert PROCESSOR(TEXTS, NESTED, padding=True, truncation=off, max_length=3)["input_ids"].shape[1] == longest


def test_bos_stays_where_special_tokens_are_not_to_be_added():
    expected = PROCESSOR("a <|image_1|> b", WIDE)
    assert same(PROCESSOR("a <|image_1|> b", WIDE, add_special_tokens=False), expected)


def test_padding_to_a_multiple():
    features = PROCESSOR(TEXTS, NESTED, padding=True, pad_to_multiple_of=32)
    longest = max(map(len, ROWS))
    assert longest % 32
    assert features["input_ids"].shape[1] == features["attention_mask"].shape[1] == -(-longest // 32) * 32
    assert features["attention_mask"].sum() == sum(map(len, ROWS))


def test_attention_mask_is_left_out_on_request():
    assert PROCESSOR("a", return_attention_mask=False).keys() == {"input_ids"}


def test_unknown_keywords_are_refused_by_name():
    with pytest.raises(TypeError, match="unexpected keyword argument 'do_resize'"):
        PROCESSOR("a", do_resize=True)
    with pytest.raises(ValueError, match="found no text: expected at least one"):
        PROCESSOR([])


@pytest.mark.parametrize("side", ["left", "right"])
def test_offsets_are_the_characters_of_each_token_in_the_text_as_it_was_given(side):
    texts = ["<|user|>\n<|image_1|>\nWhat? é日<|end|>\n<|assistant|>\n Seven.<|end|>\n", "hi"]
    features = PROCESSOR(texts, [[WIDE], []], padding=True, padding_side=side, return_offsets_mapping=True)
    for text, row, spans in zip(texts, features["input_ids"].tolist(), features["offset_mapping"], strict=True):
        assert len(spans) == len(row)
        assert [start for start, _ in spans] == sorted(start for start, _ in spans)
        named = set()
        for token, (start, end) in zip(row, spans, strict=True):
            if token in (IMAGE, PAD, PROCESSOR.tokenizer.bos_token_id):
                assert start == end
            else:
                assert start < end <= len(text)
                named |= set(range(start, end))
        unnamed = "".join(character for place, character in enumerate(text) if place not in named)
        assert unnamed.replace("\n", "").replace(" ", "") in ("<|image_1|>", ""), "all but tags and stripped space"
    (assistant,) = PROCESSOR.tokenizer.convert_tokens_to_ids(["<|assistant|>"])
    place = features["input_ids"][0].tolist().index(assistant)
    start, end = features["offset_mapping"][0][place]
    assert texts[0][start:end] == "<|assistant|>", "not the space behind it, which belongs to the answer"


def test_padded_crops_on_request_give_the_official_layout_of_the_same_crops():
    plain, padded = (
        PROCESSOR(TEXTS, NESTED, padding=True, num_crops=3, pad_crops=pad, return_tensors="np") for pad in (False, True)
    )
    assert padded["pixel_values"].shape == (3, 4, 3, 28, 28)
    counts = [1 + height * width // 28**2 for height, width in plain["image_sizes"].tolist()]
    found = np.concatenate([image[:count] for image, count in zip(padded["pixel_values"], counts, strict=True)])
    assert np.array_equal(found, plain["pixel_values"])


def test_what_vllm_asks_the_processor_for():
    assert PROCESSOR.img_tokens[:3] == ["<|image_1|>", "<|image_2|>", "<|image_3|>"]
    for image in (WIDE, TALL, SQUARE):
        size = {"width": image.width, "height": image.height}
        assert PROCESSOR.calc_num_image_tokens_from_image_size(**size) == TOKENS[id(image)]
        few = PROCESSOR.image_processor(image, num_crops=1)["num_img_tokens"][0]
        assert PROCESSOR.calc_num_image_tokens_from_image_size(**size, num_crops=1) == few


# Chat template


def plain(messages: list[dict], prompt: bool) -> str:
    """What the official template writes, tags for images as the content parts have them."""
    text, images = "", 0
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            pieces = []
            for part in content:
                images += part["type"] != "text"
                pieces.append(part["text"] if part["type"] == "text" else f"<|image_{images}|>\n")
            content = "".join(pieces)
        text += f"<|{message['role']}|>\n{content}<|end|>\n"
    return text + "<|assistant|>\n" * (prompt and messages[-1]["role"] != "assistant")


SENTENCES = [
    "",
    " ",
    "\n",
    " a\n",
    "\n\n b ",
    "{{ 1 }}",
    "{% generation %}",
    "<|end|>",
    "<b>&amp;'\"",
    "日本 é\t.",
    "<|image_1|>\nx",
]


@pytest.mark.parametrize("seed", range(40))
def test_the_generation_marks_change_no_character_of_what_is_rendered(seed):
    draw = random.Random(seed)

    def content():
        if draw.random() < 0.5:
            return draw.choice(SENTENCES)
        parts = [{"type": "text", "text": draw.choice(SENTENCES)}, {"type": "image"}, {"type": "image_url"}]
        return draw.choices(parts, k=draw.randint(0, 4))

    roles = draw.choices(["user", "assistant", "system"], k=draw.randint(1, 6))
    messages = [{"role": role, "content": content()} for role in roles]
    for prompt in (False, True):
        expected = plain(messages, prompt)
        assert PROCESSOR.apply_chat_template(messages, add_generation_prompt=prompt) == expected
        tokenizer = PROCESSOR.tokenizer
        found = tokenizer.apply_chat_template(
            messages, chat_template=PROCESSOR.chat_template, add_generation_prompt=prompt, tokenize=False
        )
        assert found == expected


def masked(processor, conversations: list[list[dict]], **kwargs) -> list[list[list[int]]]:
    """Ids of each run of the assistant's tokens, of each conversation."""
    features = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "return_tensors": "pt", **kwargs},
    )
    masks = torch.as_tensor(features["assistant_masks"])
    assert masks.shape == features["input_ids"].shape
    runs = []
    for row, mask in zip(features["input_ids"].tolist(), masks.tolist(), strict=True):
        pairs = groupby(zip(row, mask, strict=True), key=lambda pair: pair[1])
        runs.append([[token for token, _ in pairs] for is_answer, pairs in pairs if is_answer])
    return runs


@pytest.mark.parametrize("side", ["left", "right"])
def test_assistant_tokens_are_the_answers_and_their_end_and_nothing_else(side):
    image = {"type": "image", "image": WIDE}
    text = {"type": "text", "text": "What <|assistant|> is it?"}
    conversations = [
        chat([image, text], "Seven.", "Sure?", "Yes, 7\nof them"),
        chat("Hi", "", [image, {"type": "image", "image": TALL}, text], [{"type": "text", "text": "日"}]),
        chat("Who?"),
    ]

    def answer(words):
        start = len(ids("<|assistant|>\n"))
        return ids(f"<|assistant|>\n{words}<|end|>")[start:]

    expected = [[answer("Seven."), answer("Yes, 7\nof them")], [answer(""), answer("日")], []]
    assert masked(PROCESSOR, conversations, padding_side=side) == expected


IN_A_CONTENT_PART = {
    "PIL": lambda path: {"type": "image", "image": Image.open(path)},
    "path as image": lambda path: {"type": "image", "image": str(path)},
    "path": lambda path: {"type": "image", "path": str(path)},
    "Path": lambda path: {"type": "image", "path": path},
    "file reference": lambda path: {"type": "image", "url": path.as_uri()},
    "base64": lambda path: {"type": "image", "base64": base64.b64encode(path.read_bytes()).decode()},
    "OpenAI, data URI": lambda path: {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()},
    },
    "OpenAI, file": lambda path: {"type": "image_url", "image_url": {"url": path.as_uri()}},
    "image_url as text": lambda path: {"type": "image_url", "image_url": str(path)},
    "data URI as image": lambda path: {
        "type": "image",
        "image": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
    },
    "file reference as path": lambda path: {"type": "image", "path": path.as_uri()},
}


@pytest.mark.parametrize("part", IN_A_CONTENT_PART.values(), ids=IN_A_CONTENT_PART.keys())
def test_images_stand_in_content_parts_in_every_usual_form(part, tmp_path):
    WIDE.save(tmp_path / "a b.png")
    messages = chat([part(tmp_path / "a b.png"), {"type": "text", "text": "What?"}])
    features = PROCESSOR.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert same(features, PROCESSOR("<|user|>\n<|image_1|>\nWhat?<|end|>\n", WIDE))


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ({"type": "image", "path": "/nowhere/a.png"}, "no such file"),
        ({"type": "image", "image": "file:///nowhere/a.png"}, "no such file"),
        ({"type": "image", "image": "data:image/png;base64,AAAA"}, "cannot identify image file"),
        (
            {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
            "an address on a network, from which",
        ),
        ({"type": "image", "image": 3}, "torch tensor or path, found int"),
    ],
    ids=str,
)
def test_what_is_no_image_in_a_content_part_is_refused_in_one_line(part, found):
    with pytest.raises((ValueError, TypeError), match=found) as error:
        PROCESSOR.apply_chat_template(chat([part]), tokenize=True, return_dict=True)
    assert "\n" not in str(error.value)
    assert "0x" not in str(error.value)


def test_ids_beside_the_mask_of_assistant_tokens_are_lists_as_the_mask_is():
    """TRL looks whether the last of an answer's ids is one of the added tokens, which no tensor is."""
    messages = chat([{"type": "image", "image": WIDE}, {"type": "text", "text": "What?"}], "Seven.")
    settings = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = PROCESSOR.apply_chat_template(messages, **settings)
    assert [type(found[name][0][0]) for name in ("input_ids", "attention_mask", "assistant_masks")] == [int] * 3
    tensors = PROCESSOR.apply_chat_template(messages, **settings, return_tensors="pt")
    assert tensors["input_ids"].tolist() == found["input_ids"]
    assert torch.equal(tensors["pixel_values"], found["pixel_values"])


LOAD = "from transformers import AutoProcessor; print(type(AutoProcessor.from_pretrained({folder!r})).__name__)"


def test_a_folder_that_names_remote_code_is_refused_where_phi3v_is_not_imported(tmp_path):
    """Without the name transformers would silently give the tokenizer alone; and only this file's name counts."""
    PROCESSOR.save_pretrained(tmp_path)
    tiny.config().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "processor_config.json").read_text())
    code = "microsoft/Phi-3.5-vision-instruct--processing_phi3_v.Phi3VProcessor"
    (tmp_path / "processor_config.json").write_text(json.dumps({**written, "auto_map": {"AutoProcessor": code}}))
    without, imported = (
        subprocess.run(
            [sys.executable, "-c", first + LOAD.format(folder=str(tmp_path))],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        for first in ("", "import phi3v; ")
    )
    assert without.returncode == 1
    assert "trust_remote_code=True" in without.stderr.splitlines()[-1]
    assert imported.stdout.splitlines()[-1:] == ["Phi3VProcessor"], imported.stderr
