"""Builds a tiny Phi-3.5-vision and a small data set of handwritten numbers: a first success without GPU, hub or download.

    python demo.py demo_output                      # or: make demo
    python demo.py demo_output --strategy lora      # goes on from the weights of the full run, where there is one

writes demo_output/model, a model folder with random weights, and demo_output/data, pages in the layout of the DocVQA data
sets (rows.jsonl and images/), and fine-tunes the one on the other with the real script, under torchrun with two processes.
Nothing in it is special: the classes, files and special tokens are those of the real model, only smaller.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor

QUESTION = "What is the handwritten number?"

NUM_PROCESSES = 2
# Found by experiment: from random weights to an ANLS of about 0.97 in three passes.
DEMO_FLAGS = [
    *("--num_crops", "1", "--batch_size", "32", "--batch_size_per_gpu", "16", "--learning_rate", "3e-3"),
    *("--num_train_epochs", "3", "--recompute", "none", "--logging_steps", "20"),
    # Each call shows a whole run, also after another one.
    *("--save_strategy", "no", "--overwrite_output_dir"),
    *("--per_device_eval_batch_size", "50", "--max_new_tokens", "8"),
]
# Over the weights of the full run the others start where it ended, so that a smaller learning rate and one pass do.
STRATEGIES = {
    "full": [],
    "frozen": ["--freeze_vision_model", "--learning_rate", "1e-3", "--num_train_epochs", "1"],
    "lora": ["--use_lora", "--learning_rate", "1e-3", "--num_train_epochs", "1"],
    "qlora": ["--use_lora", "--use_qlora", "--learning_rate", "1e-3", "--num_train_epochs", "1"],
}

PAGE_SIZE = 224  # pixels
# Side of a box on the page, pixels. The page is 4 image tokens wide and high, so each box falls on one of them (the model
# sees it twice, as a crop and in the global view).
CELL = 56
GREY, INK = (180, 180, 180), (20, 40, 160)
NUM_TEST_DIGITS = 300

SPACE = "▁"
# Words of the demo's prompts, as they stand after a space and at the start of a line; all else is spelled character by
# character. Only so that a prompt is some 10 tokens long rather than 40.
WORDS = ("What", "Answer", *(SPACE + word for word in ("is", "the", "handwritten", "number", "briefly")))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of some 400 entries that behaves like the official one: BOS, byte fallback, the special tokens' flags."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # A space never reaches the model: the normalizer turns it into "▁".
    pieces += [SPACE, *(chr(code) for code in range(33, 127))]
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Names and flags. Source: https://huggingface.co/microsoft/Phi-3.5-vision-instruct (tokenizer.json, added_tokens)
    for content, special, rstrip in [
        ("<unk>", True, False),
        ("<s>", True, False),
        ("</s>", False, True),
        ("<|endoftext|>", True, False),
        ("<|assistant|>", True, True),
        ("<|system|>", True, False),
        ("<|end|>", True, False),
        ("<|user|>", True, False),
        ("<|image|>", True, True),
    ]:
        tokenizer.add_tokens([AddedToken(content, rstrip=rstrip, normalized=False, special=special)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        model_max_length=131072,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> Phi3VConfig:
    """The configuration of a tiny Phi-3.5-vision, whose token ids are those of `tokenizer`."""
    hidden_size, num_heads = 64, 2
    # The default ranges suit the width of the real model; from random weights, a narrow one hardly learns with them.
    text_range, vision_range = 0.09, 0.2
    num_frequencies = hidden_size // num_heads // 2
    return Phi3VConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        end_token_id=tokenizer.convert_tokens_to_ids("<|end|>"),
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        num_hidden_layers=2,
        intermediate_size=128,
        initializer_range=text_range,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={"type": "su", "short_factor": [1.0] * num_frequencies, "long_factor": [4.0] * num_frequencies},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 112,  # pixels; 112 / 14 / 2 = 4 image tokens along a crop's side
            "patch_size": 14,
            "initializer_range": vision_range,
        },
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, config: Phi3VConfig) -> Phi3VProcessor:
    """The processor whose crops and image tokens fit `config`."""
    image_processor = Phi3VImageProcessor(
        num_crops=1,
        crop_size=config.vision_config.image_size,
        num_img_tokens=config.crop_tokens_per_side**2,
        # White paper becomes 0. With CLIP's own numbers the white of an untrained model drowns the ink and the places.
        image_mean=[1.0, 1.0, 1.0],
        image_std=[1.0, 1.0, 1.0],
    )
    return Phi3VProcessor(image_processor, tokenizer)


def build_model(folder: str | Path, seed: int = 0) -> Path:
    """Writes a model folder (config, float32 weights, tokenizer, processor) and returns its path.

    Args:
        folder (str | Path): is created; files of the same names are replaced.
        seed (int): of the random weights.
    """
    folder = Path(folder)
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    # The caller's random numbers stay as they are.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Phi3VForCausalLM(config)
    model.save_pretrained(folder)
    build_processor(tokenizer, config).save_pretrained(folder)
    return folder


def split_digits(seed: int) -> dict[str, list[int]]:
    """Numbers of the 1797 digit images for each split, so that no test page holds a digit image of a train page."""
    numbers = list(range(len(load_digits().target)))
    random.Random(seed).shuffle(numbers)
    return {"train": numbers[NUM_TEST_DIGITS:], "test": numbers[:NUM_TEST_DIGITS]}


def draw_page(digits: list[np.ndarray], rng: random.Random) -> Image.Image:
    """A form with up to three boxes, one handwritten digit in each from the left.

    Args:
        digits (list[np.ndarray]): 1 to 3 images of shape (8, 8), ink from 0 to 16.
        rng (random.Random): for the printed text and how each digit lies in its box.
    """
    page = Image.new("RGB", (PAGE_SIZE, PAGE_SIZE), "white")
    draw = ImageDraw.Draw(page)
    draw.text((12, 14), rng.choice(("INVOICE", "RECEIPT", "ORDER", "DELIVERY")), "black", ImageFont.load_default(22))
    draw.line((12, 44, PAGE_SIZE - 12, 44), "black", 2)
    draw.text((12, 74), rng.choice(("No.", "Total", "Item", "Qty")), "black", ImageFont.load_default(16))
    for y in (136, 160, 184):
        draw.line((12, y, rng.randint(70, 140), y), GREY, 4)
        draw.line((rng.randint(168, 190), y, PAGE_SIZE - 12, y), GREY, 4)
    for left in (CELL, 2 * CELL, 3 * CELL):
        draw.rectangle((left + 3, CELL + 3, left + CELL - 4, 2 * CELL - 4), outline=GREY, width=2)
    for left, digit in zip((CELL, 2 * CELL, 3 * CELL), digits, strict=False):
        height = rng.randint(50, 58)
        width = round(height * rng.uniform(0.9, 1.05))
        # A margin, because ink may touch the border of an image.
        ink = Image.fromarray(np.pad(digit * (255 / 16), 1).round().astype(np.uint8))
        ink = ink.resize((width, height), Image.Resampling.BICUBIC)
        ink = ink.rotate(rng.uniform(-5, 5), Image.Resampling.BICUBIC)
        # Harder edges, as of a pen.
        ink = ink.point([min(255, max(0, round((value - 60) * 1.6))) for value in range(256)])
        x = left + (CELL - width) // 2 + rng.randint(-3, 3)
        y = CELL + (CELL - height) // 2 + rng.randint(-3, 3)
        page.paste(INK, (x, y), ink)
    return page


def build_data(folder: str | Path, seed: int = 0, num_train: int = 4000, num_test: int = 200) -> Path:
    """Writes a data set in the DocVQA layout, rows.jsonl and images/, and returns its path; the same for the same seed.

    Args:
        folder (str | Path): is created; files of the same names are replaced.
        seed (int): of the split, the numbers and the pages.
        num_train, num_test (int): pages of each split.

    Source: the digits are scikit-learn's, https://archive.ics.uci.edu/dataset/80 (CC BY 4.0), 8 x 8 pixels each.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    data = load_digits()
    rng = random.Random(seed)
    parts, counts = split_digits(seed), {"train": num_train, "test": num_test}
    seen = set()
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for split, count in counts.items():
            for index in range(count):
                numbers = None
                while numbers is None or numbers in seen:
                    numbers = tuple(rng.choice(parts[split]) for _ in range(rng.randint(1, 3)))
                seen.add(numbers)
                name = f"images/{split}_{index:04}.png"
                # Compressed lightly: it halves the time.
                draw_page([data.images[number] for number in numbers], rng).save(folder / name, compress_level=1)
                answer = "".join(str(data.target[number]) for number in numbers)
                row = {
                    "id": f"{split}-{index}",
                    "split": split,
                    "image": name,
                    "query": {"en": QUESTION},
                    "answers": [answer],
                }
                file.write(json.dumps(row) + "\n")
    return folder


def fine_tune(out_dir: Path, strategy: str) -> Path:
    """Runs the DocVQA script on the tiny model, or for another strategy than full on the weights of the full run.

    Returns:
        Path: the script's output folder.
    """
    output = out_dir / strategy
    full = out_dir / "full"
    model = full if strategy != "full" and (full / "config.json").exists() else out_dir / "model"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_PROCESSES}"),
        *("finetune_hf_trainer_docvqa.py", "--model_name_or_path", str(model), "--data_dir", str(out_dir / "data")),
        *("--output_dir", str(output), *DEMO_FLAGS, *STRATEGIES[strategy]),
    ]
    print(f"\n{shlex.join(['torchrun', *command[3:]])}\n", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if subprocess.run(command, cwd=Path(__file__).parent, env=environment).returncode:
        sys.exit(f"the {strategy} run failed, see above")
    return output


def ask(out_dir: Path, output: Path) -> str:
    """Asks the trained model about a page that it has not seen, and returns the command that does."""
    page = out_dir / "data" / "images" / "test_0000.png"
    # As the script asks in training.
    command = ["-m", "finetuning.ask", str(output), "--image", str(page), f"{QUESTION}\nAnswer briefly."]
    rows = map(json.loads, (out_dir / "data" / "rows.jsonl").read_text().splitlines())
    written = next(row["answers"][0] for row in rows if row["image"] == f"images/{page.name}")
    print(f"\n{written} is written on {page}; it reads:", flush=True)
    if subprocess.run([sys.executable, *command], cwd=Path(__file__).parent).returncode:
        sys.exit("asking failed, see above")
    # The environment of `make demo` is not activated.
    own = Path(sys.executable).is_relative_to(Path.cwd())
    return shlex.join([os.path.relpath(sys.executable) if own else sys.executable, *command])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path, nargs="?", default=Path("demo_output"), help="folder for everything")
    parser.add_argument("--strategy", choices=STRATEGIES, default="full")
    args = parser.parse_args(arguments)
    out_dir = args.out_dir.resolve()
    if not (out_dir / "model" / "config.json").exists():
        build_model(out_dir / "model")
    if not (out_dir / "data" / "rows.jsonl").exists():
        # Whole or not at all: an interrupted start is begun again.
        build_data(out_dir / "data.partial").rename(out_dir / "data")
    print(f"tiny Phi-3.5-vision with random weights: {out_dir / 'model'}")
    print(f"4,000 pages to learn from, 200 to be asked about: {out_dir / 'data'}")
    output = fine_tune(out_dir, args.strategy)
    scores = {stage: json.loads((output / f"eval_{stage}.json").read_text())["anls"] for stage in ("before", "after")}
    command = ask(out_dir, output)
    print(f"""
ANLS on pages it has not seen: {scores["before"]:.2f} before, {scores["after"]:.2f} after.
Look at {output / "report.html"} and {output / "curves.png"}; every answer is in predictions.jsonl beside them.

Ask it yourself (without the question: a chat):
    {command}

Next, on one or more real GPUs (the model and the data are fetched from the Hugging Face hub):
    torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py --bf16""")


if __name__ == "__main__":
    main(sys.argv[1:])
