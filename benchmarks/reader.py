"""Reads one saved folder as one of its consumers does; started by benchmarks/consumers.py, in an environment of the consumer's own.

    python benchmarks/reader.py CONSUMER FOLDER CASES RESULT [--base BASE] [--code CODE]

CONSUMER: phi3v (this package, by transformers' Auto classes), adapter (the same over PEFT), pipeline, files (transformers 4.x
without any code of the model), official and official-adapter (the official code, in the folder CODE).
CASES: a JSON list of {"text", "images"}. RESULT: a file that torch.load reads, of each case ids, logits and answer as far as the
consumer gives them. Needs torch, transformers and Pillow, phi3v for its own consumers, PEFT for adapters.
"""

import argparse
import builtins
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image, ImageOps

NEW_TOKENS = 16
IMAGE_TOKEN_ID = 32044
asked = []


def refuse(*question) -> str:
    """In the place of `input`: notes that somebody was to be asked whether to run code."""
    asked.append(question)
    return "n"


def stand_in_for_torchvision() -> None:
    """What the official image processor takes from torchvision, of which there is no build for CPUs: all of it PIL's and torch's."""
    torchvision, transforms, functional = (
        ModuleType(f"torchvision{name}") for name in ("", ".transforms", ".functional")
    )
    functional.pad = lambda image, padding, fill: ImageOps.expand(image, tuple(padding), tuple(fill))  # type: ignore[attr-defined]
    functional.resize = lambda image, size: image.resize(size[::-1], Image.Resampling.BILINEAR)  # type: ignore[attr-defined]

    def to_tensor():
        import numpy as np

        return lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)

    def normalize(mean, std):
        mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        return lambda pixels: (pixels - mean) / std

    def compose(steps):
        def run(image):
            for step in steps:
                image = step(image)
            return image

        return run

    transforms.functional, transforms.Compose = functional, compose  # type: ignore[attr-defined]
    transforms.ToTensor, transforms.Normalize = to_tensor, normalize  # type: ignore[attr-defined]
    torchvision.transforms = transforms  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": torchvision, "torchvision.transforms": transforms}


def import_official(code: str) -> tuple[Any, Any]:
    """Processor and model class of the official code in a folder, which the caller has named: nothing that a saved folder says."""
    # First: it loads transformers anew, and the official code gives transformers a class; it also looks for the real torchvision.
    import transformers.processing_utils  # noqa: F401

    stand_in_for_torchvision()
    package = ModuleType("official")
    package.__path__ = [code]
    sys.modules["official"] = package
    processing, modeling = (import_module(f"official.{name}_phi3_v") for name in ("processing", "modeling"))
    return processing.Phi3VProcessor, modeling.Phi3VForCausalLM


def check_auto_map(folder: str) -> None:
    """Checks that every class that a folder's files name for those who trust remote code is one of the imported official code."""
    for path in sorted(Path(folder).glob("*.json")):
        for reference in (json.loads(path.read_text(encoding="utf-8")).get("auto_map") or {}).values():
            repository, _, name = reference.partition("--")
            module, _, found = name.partition(".")
            assert repository == "microsoft/Phi-3.5-vision-instruct", reference
            assert hasattr(import_module(f"official.{module}"), found), reference


def load(consumer: str, folder: str, base: str, code: str) -> tuple[Any, Any]:
    """Processor and model, as somebody would load them who knows nothing of this repository."""
    processor_class: Any
    model_class: Any
    if consumer.startswith("official"):
        processor_class, model_class = import_official(code)
        check_auto_map(folder)
        # As its model card says; the official config.json would overrule the other name.
        attention, dtype = "_attn_implementation", "torch_dtype"
    else:
        from transformers import AutoModelForCausalLM, AutoProcessor

        import phi3v  # noqa: F401

        processor_class, model_class = AutoProcessor, AutoModelForCausalLM
        attention, dtype = "attn_implementation", "dtype"
    options = {attention: "eager", dtype: torch.float32}
    processor = processor_class.from_pretrained(folder, trust_remote_code=False)
    model = model_class.from_pretrained(base, trust_remote_code=False, **options)
    if consumer.endswith("adapter"):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder, trust_remote_code=False)
    return processor, model.eval()


def read_with_model(consumer: str, folder: str, base: str, code: str, cases: list[dict]) -> list[dict]:
    processor, model = load(consumer, folder, base, code)
    found = []
    for case in cases:
        # The official processor has no template of its own.
        teller = processor.tokenizer if consumer.startswith("official") else processor
        messages = [{"role": "user", "content": case["text"]}]
        prompt = teller.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images = [Image.open(path) for path in case["images"]] or None
        inputs = processor(prompt, images, return_tensors="pt")
        ids = inputs["input_ids"].clone()
        with torch.no_grad():
            # The official code overwrites input_ids.
            copied = {**inputs, "input_ids": ids.clone()}
            logits = model(**copied).logits[0].float()
            # The stop ids are those of generation_config.json.
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = output[0, ids.shape[1] :].tolist()
        found.append(
            {"ids": ids[0].clamp_min(-1).where(ids[0] >= 0, IMAGE_TOKEN_ID).tolist(), "logits": logits, "new": new}
        )
    return found


def read_by_pipeline(folder: str, cases: list[dict]) -> list[dict]:
    from transformers import pipeline

    import phi3v  # noqa: F401

    answer = pipeline("image-text-to-text", folder, dtype=torch.float32)
    found = []
    for case in cases:
        parts = [{"type": "image", "path": path} for path in case["images"]]
        parts.append({"type": "text", "text": re.sub(r"<\|image_\d+\|>\n", "", case["text"])})
        said = answer(
            text=[{"role": "user", "content": parts}],
            generate_kwargs={"max_new_tokens": NEW_TOKENS, "do_sample": False},
        )
        found.append({"text": said[0]["generated_text"][-1]["content"]})
    return found


def read_files(folder: str, cases: list[dict]) -> list[dict]:
    """Ids of the texts between the images, by both classes of transformers 4.x; and that the other files can be read."""
    from transformers import GenerationConfig, LlamaTokenizerFast, PreTrainedTokenizerFast

    with open(f"{folder}/config.json") as file:
        rope = json.load(file)["rope_scaling"]
    assert sorted(rope) == ["long_factor", "short_factor", "type"], sorted(rope)
    assert rope["type"] == "su"
    stop = GenerationConfig.from_pretrained(folder, trust_remote_code=False).eos_token_id
    assert sorted(stop) == [32000, 32007], stop
    found = []
    for case in cases:
        rows = []
        for kind in (LlamaTokenizerFast, PreTrainedTokenizerFast):
            tokenizer = kind.from_pretrained(folder, trust_remote_code=False)
            messages = [{"role": "user", "content": case["text"]}]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            rows.append([token for text in re.split(r"<\|image_\d+\|>", prompt) for token in tokenizer(text).input_ids])
        assert rows[0] == rows[1]
        found.append({"ids_of_text": rows[0]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("consumer", "folder", "cases", "result"):
        parser.add_argument(name)
    parser.add_argument("--base", help="whole model below an adapter")
    parser.add_argument("--code", help="folder with the official code")
    args = parser.parse_args()
    builtins.input = refuse
    with open(args.cases) as file:
        cases = json.load(file)
    if args.consumer == "pipeline":
        found = read_by_pipeline(args.folder, cases)
    elif args.consumer == "files":
        found = read_files(args.folder, cases)
    else:
        found = read_with_model(args.consumer, args.folder, args.base or args.folder, args.code, cases)
    torch.save({"cases": found, "asked": len(asked)}, args.result)


if __name__ == "__main__":
    main()
