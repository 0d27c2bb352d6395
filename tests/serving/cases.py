"""A model that vLLM can serve (the official vision tower, a small language model, random weights) and what it is asked."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from demo import build_tokenizer
from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor

NEW_TOKENS = 16


def build_folder(folder: Path) -> Path:
    """Writes a model folder with about 300 M parameters, nearly all of them CLIP's: vLLM knows no other tower."""
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


def conversations() -> dict[str, list[dict]]:
    found = {f"page {n}": chat([page(n), f"What is the total of page {n}?\nAnswer briefly."]) for n in range(4)}
    found |= {f"meme {n}": chat([meme(n), f'The text is "a {n}"\nIs it hateful?']) for n in range(4)}
    found |= {f"pair {n}": chat([page(n), meme(n), "Is the left one larger? Yes or no."]) for n in range(3)}
    found["several turns"] = chat([page(1), "What is it?"], "A page.", [meme(2), "And this?"])
    found["a question first"] = chat(["Look at this:  ", page(2), " and say\n\nwhat\tit is "])
    found["wide"] = chat([page(1, (900, 100)), "Read it."])
    found["tall"] = chat([page(1, (60, 500)), "Read it."])
    found["other scripts"] = chat([meme(3), "Was ist das? 日本 é <b>&amp;</b> {x}"])
    found |= {
        f"text {n}": chat(question) for n, question in enumerate(["Hello", " Who are\n you? ", "1 + 1 = 2, 2 + 2 ="])
    }
    found["text, several turns"] = chat("Hello", "Hi!", "Who?")
    found["clip"] = chat([*(meme(n) for n in range(9)), "Classify the video."])
    return found


# Instead of the 1 of the folder, which keeps the test short: each crop is a pass of CLIP ViT-L/14.
NUM_CROPS = {"wide": 3, "tall": 2}


def images_of(messages: list[dict]) -> list[Image.Image]:
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]


def prompt_of(processor: Phi3VProcessor, messages: list[dict]) -> str:
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def expected_answers(folder: Path) -> dict[str, tuple[list[int], list[int]]]:
    """By conversation the ids of its prompt and those that generate() writes, never stopped early."""
    model = Phi3VForCausalLM.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    processor = Phi3VProcessor.from_pretrained(folder)
    found = {}
    for name, messages in conversations().items():
        images = images_of(messages) or None
        batch = processor(prompt_of(processor, messages), images, num_crops=NUM_CROPS.get(name))
        with torch.inference_mode():
            ids = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
        length = batch["input_ids"].shape[1]
        found[name] = ids[:length], ids[length:]
    return found
