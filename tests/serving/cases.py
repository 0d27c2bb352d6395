"""A model that vLLM can serve (the official vision tower, a small language model, random weights) and what it is asked."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from demo import build_tokenizer
from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor
from phi3v.configuration_phi3_v import IMG_PROCESSOR

NEW_TOKENS = 16
SHARED = Path(__file__).parents[2] / "../shared/data"


def build_folder(folder: Path, clip_layers: int = 4) -> Path:
    """Writes a model folder of which nearly all is CLIP ViT-L/14-336: vLLM knows no other tower.

    Args:
        folder (Path): is created.
        clip_layers (int): layers of the tower, whose last is never run; 24 in the official one. vLLM builds as many as
            `img_processor.layer_idx` says. Six times as many only take six times as long.
    """
    tokenizer = build_tokenizer()
    config = Phi3VConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        end_token_id=tokenizer.convert_tokens_to_ids("<|end|>"),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        # Short and long factors far apart: whoever takes the wrong ones answers something else.
        rope_scaling={"type": "su", "short_factor": [1.0] * 48, "long_factor": [8.0] * 48},
        vision_config={"num_hidden_layers": clip_layers},
        img_processor={**IMG_PROCESSOR, "layer_idx": clip_layers - 2},
    )
    model = Phi3VForCausalLM._from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # Large enough that images and words decide what is answered.
            if tensor.ndim > 1:
                scale = 1 if name.endswith(("embed_tokens.weight", "GN")) else 1.5 * tensor[0].numel() ** -0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    Phi3VProcessor(Phi3VImageProcessor(num_crops=1), tokenizer).save_pretrained(folder)
    return folder


def page(number: int, size: tuple[int, int] = (340, 440)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for line in range(number + 3):
        draw.text((10, 10 + 24 * line), f"{number} line {line * number}", "black")
    draw.rectangle((20, 30 * number, 200, 30 * number + 40), fill=(30 * number % 256, 90, 200))
    return image


def meme(number: int) -> Image.Image:
    return page(number, (200, 200))


def chat(*turns: str | list) -> list[dict]:
    """Messages of user and assistant in turn; a list holds images and texts."""
    messages = []
    for turn, content in enumerate(turns):
        if not isinstance(content, str):
            content = [
                {"type": "text", "text": x} if isinstance(x, str) else {"type": "image", "image": x} for x in content
            ]
        messages.append({"role": "assistant" if turn % 2 else "user", "content": content})
    return messages


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (SHARED / name).read_text(encoding="utf-8").splitlines()]


def shared_conversations() -> dict[str, list[dict]]:
    """Receipts, memes, pairs and the frames of clips, asked as the recipes ask them."""
    from finetuning.data.frames import decode

    found = {}
    receipts = {row["image"]: row for row in rows_of("docvqa/rows.jsonl")}
    for name, row in list(receipts.items())[:7]:
        question = row["query"]["en"] + "\nAnswer briefly."
        found[f"page {name}"] = chat([Image.open(SHARED / "docvqa" / name).convert("RGB"), question])
    folder = SHARED / "hateful_memes_standin"
    for row in rows_of("hateful_memes_standin/train.jsonl")[:8]:
        question = f'The text on the image is "{row["text"]}"\nIs it hateful? Answer yes or no.'
        found[f"meme {row['id']}"] = chat([Image.open(folder / row["img"]).convert("RGB"), question])
    for row in rows_of("nlvr2/rows_nlvr1.jsonl")[:3] + rows_of("nlvr2/rows_photo_pairs.jsonl")[:3]:
        pair = [Image.open(SHARED / "nlvr2" / name).convert("RGB") for name in row["images"]]
        found[f"pair {row['id']}"] = chat([*pair, row["texts"][0]["user"]])
    for path in sorted((SHARED / "ucf101" / "UCF101_subset" / "test").glob("*/*.avi"))[:2]:
        frames, _, _ = decode(str(path), 8, None)
        images = [frame.to_image() for _, frame in sorted(frames.items())]
        found[f"clip {path.stem}"] = chat([*images, "Classify the video."])
    return found


def made_conversations() -> dict[str, list[dict]]:
    """In place of `shared_conversations`."""
    found = {f"page {n}": chat([page(n), f"What is the total of page {n}?\nAnswer briefly."]) for n in range(7)}
    found |= {f"meme {n}": chat([meme(n), f'The text is "a {n}"\nIs it hateful?']) for n in range(8)}
    found |= {f"pair {n}": chat([page(n), meme(n), "Is the left one larger? Yes or no."]) for n in range(6)}
    found |= {f"clip {n}": chat([*(page(n, (320 + i, 240)) for i in range(8)), "Classify it."]) for n in range(2)}
    return found


def conversations() -> dict[str, list[dict]]:
    """By name: 23 of pages, memes, pairs and clips, then what else may be asked."""
    found = shared_conversations() if SHARED.exists() else made_conversations()
    found["several turns"] = chat([page(1), "What is it?"], "A page.", [meme(2), "And this?"])
    found["a question first"] = chat(["Look at this:  ", page(2), " and say\n\nwhat\tit is "])
    found["wide"] = chat([page(1, (900, 100)), "Read it."])
    found["tall"] = chat([page(1, (60, 500)), "Read it."])
    found["one pixel"] = chat([Image.new("RGB", (1, 1), "red"), "Which colour?"])
    found["a line"] = chat([Image.new("RGB", (3000, 1), "blue"), "Which colour?"])
    # Without alpha, and the 8 high bits: vLLM by itself would put the one on white and make the other white.
    transparent = page(4)
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    found["transparent"] = chat([transparent, "Read it."])
    found["16 bits"] = chat([Image.fromarray(np.arange(0, 60000, 6, dtype=np.uint16).reshape(100, 100)), "What is it?"])
    found["other scripts"] = chat([meme(3), "Was ist das? 日本 é <b>&amp;</b> {x}"])
    found |= {
        f"text {n}": chat(question) for n, question in enumerate(["Hello", " Who are\n you? ", "1 + 1 = 2, 2 + 2 ="])
    }
    found["text, several turns"] = chat("Hello", "Hi!", "Who?")
    found["9 pictures"] = chat([*(meme(n) for n in range(9)), "Classify the video."])
    return found


# Instead of the 1 of the folder, which keeps the test short: each crop is a pass of CLIP ViT-L/14.
NUM_CROPS = {"wide": 3, "tall": 2, "a line": 4}


def images_of(messages: list[dict]) -> list[Image.Image]:
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]


def as_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def as_openai(messages: list[dict]) -> list[dict]:
    """The same messages with images as data URIs, as the OpenAI API takes them."""

    def part(content):
        if content["type"] == "text":
            return content
        return {"type": "image_url", "image_url": {"url": as_uri(content["image"])}}

    contents = [message["content"] for message in messages]
    return [
        {**message, "content": content if isinstance(content, str) else [part(piece) for piece in content]}
        for message, content in zip(messages, contents, strict=True)
    ]


def request_of(processor: Phi3VProcessor, name: str, messages: list[dict]) -> dict:
    """Body of a POST to /v1/chat/completions that asks for `NEW_TOKENS` tokens, never stopped early."""
    request = {
        "model": "phi3v",
        "messages": as_openai(messages),
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
        "ignore_eos": True,
        # generate() never writes <|image|>, by its own configuration.
        "logit_bias": {str(processor.image_token_id): -100},
        "return_token_ids": True,
        # The template writes no BOS, and without images vLLM adds it only where it is told to.
        "add_special_tokens": True,
    }
    if name in NUM_CROPS:
        request["mm_processor_kwargs"] = {"num_crops": NUM_CROPS[name]}
    return request


def prompt_of(processor: Phi3VProcessor, messages: list[dict]) -> str:
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def expected_answers(folder: Path, num_crops: int | None = None) -> dict[str, tuple[list[int], list[int]]]:
    """By conversation the ids of its prompt and those that generate() writes, never stopped early.

    Args:
        folder (Path): the model.
        num_crops (int, optional): where `NUM_CROPS` has no other; by default the folder's own.
    """
    model, processor = load(folder)
    found = {}
    for name, messages in conversations().items():
        images = images_of(messages) or None
        batch = processor(prompt_of(processor, messages), images, num_crops=NUM_CROPS.get(name, num_crops))
        with torch.inference_mode():
            ids = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
        length = batch["input_ids"].shape[1]
        found[name] = ids[:length], ids[length:]
    return found


def load(folder: Path) -> tuple[Phi3VForCausalLM, Phi3VProcessor]:
    """The model, which never stops early, and its processor."""
    model = Phi3VForCausalLM.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    return model, Phi3VProcessor.from_pretrained(folder)


def differences(found: dict, expected: dict) -> dict[str, str]:
    """What differs, by conversation; both hold the ids of prompt and answer."""
    different = {}
    for name, (prompt, answer) in expected.items():
        if found[name][0] != prompt:
            different[name] = f"prompt {found[name][0]}, expected {prompt}"
        elif found[name][1] != answer:
            different[name] = f"answer {found[name][1]}, expected {answer}"
    return different
