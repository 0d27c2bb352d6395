"""Who can read what a run has saved: each kind of folder, read by each consumer in an environment of its own.

    python -m benchmarks.consumers [--official FOLDER] [--environments FOLDER] [--work FOLDER]

Trains a small model of the official layout (CLIP ViT-L/14's width with 3 layers, the official tokenizer) for two steps in all four
strategies under torchrun, merges the adapters, and has every folder read (benchmarks/reader.py). Compared with this package on the
pinned transformers: input ids, all logits in float32, greedy answers of 16 tokens, of a page, two pictures and a text.

--official: a folder with configuration_phi3_v.py, modeling_phi3_v.py and processing_phi3_v.py of microsoft/Phi-3.5-vision-instruct,
which are imported and run; without it those rows are left out.
--environments: where the consumers' environments are, or are made by pip (default: .venvs).

Unit: largest_logit_deviation, of float32 logits. Written: benchmarks/results/consumers.json.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from demo import STRATEGIES, build_data
from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor

from .models import picture
from .record import RESULTS, ROOT, provenance, write

# The official files but the weights; too large to be kept here.
OFFICIAL_FILES = ROOT.parent / "shared" / "phi35v"
# Over the official config.json. Depths and widths that no reader depends on.
SMALL = {
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    # Wide enough that logits differ.
    "initializer_range": 0.1,
    "vision_config": {"num_hidden_layers": 3, "intermediate_size": 512},
}
FLAGS = [
    *("--num_crops", "4", "--batch_size", "4", "--batch_size_per_gpu", "2", "--max_steps", "2", "--save_steps", "1"),
    *("--learning_rate", "1e-3", "--warmup_steps", "0", "--eval_size", "4", "--max_new_tokens", "4", "--no-tqdm"),
]
PINS = ("torch", "numpy", "pillow", "jinja2", "peft", "accelerate")
# name: requirements beside torch. PEFT 0.12 is of transformers 4.43's time.
ENVIRONMENTS = {
    "transformers-5.16.1": ["transformers==5.16.1"],
    "transformers-5.19.0": ["transformers==5.19.0"],
    "transformers-4.43.4": ["transformers==4.43.4", "peft==0.12.0", "accelerate<1.16", "pillow", "jinja2", "numpy<2.5"],
}
HERE = "transformers-pinned"
# what the table says: consumer of reader.py, environment
CONSUMERS = {
    "phi3v, transformers pinned (reference)": ("phi3v", HERE),
    "phi3v, transformers 5.19.0": ("phi3v", "transformers-5.19.0"),
    "phi3v, transformers 5.16.1": ("phi3v", "transformers-5.16.1"),
    "pipeline('image-text-to-text'), transformers pinned": ("pipeline", HERE),
    "pipeline('image-text-to-text'), transformers 5.16.1": ("pipeline", "transformers-5.16.1"),
    "official code, transformers 4.43.4": ("official", "transformers-4.43.4"),
    "tokenizer, template and configs, transformers 4.43.4": ("files", "transformers-4.43.4"),
}
ADAPTER_CONSUMERS = {
    "phi3v and PEFT pinned (reference)": ("adapter", HERE),
    "phi3v and PEFT pinned, transformers 5.16.1": ("adapter", "transformers-5.16.1"),
    "official code and PEFT 0.12.0, transformers 4.43.4": ("official-adapter", "transformers-4.43.4"),
}


def build_base(folder: Path) -> Path:
    """A model folder as the official one is on the hub, with few layers and random weights."""
    folder.mkdir()
    for path in OFFICIAL_FILES.iterdir():
        shutil.copyfile(path, folder / path.name)
    values = json.loads((folder / "config.json").read_text()) | SMALL
    torch.manual_seed(0)
    Phi3VForCausalLM._from_config(Phi3VConfig(**values), dtype=torch.float32).save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        # The official ones again.
        shutil.copyfile(OFFICIAL_FILES / name, folder / name)
    values["torch_dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    return folder


def build_cases(folder: Path) -> Path:
    """Questions about a page, two pictures and none."""
    folder.mkdir()
    pictures = {name: folder / f"{name}.png" for name in ("page", "photo", "meme")}
    for name, path in pictures.items():
        picture(name).resize([side // 4 for side in picture(name).size]).save(path)
    cases = [
        {"text": "<|image_1|>\nWhat is  the total? (é, 漢)\nAnswer briefly.", "images": ["page"]},
        {"text": "<|image_1|>\n<|image_2|>\nWhich one is larger?", "images": ["photo", "meme"]},
        {"text": "What do you see?", "images": []},
    ]
    for case in cases:
        case["images"] = [str(pictures[name]) for name in case["images"]]
    (folder / "cases.json").write_text(json.dumps(cases))
    return folder / "cases.json"


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)


def build_folders(work: Path) -> dict[str, Path]:
    """What the strategies and a merge have saved, by what the table calls it; adapters are named so."""
    base, data = build_base(work / "base"), build_data(work / "data", num_train=16, num_test=4)
    for strategy, flags in STRATEGIES.items():
        # The demo's own learning rates and epochs are for its tiny model.
        flags = [
            flag for flag in flags if flag.startswith("--") and flag not in ("--learning_rate", "--num_train_epochs")
        ]
        done = run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
                *("finetune_hf_trainer_docvqa.py", "--model_name_or_path", str(base), "--data_dir", str(data)),
                *("--output_dir", str(work / strategy), *FLAGS, *flags),
            ]
        )
        if done.returncode:
            sys.exit(f"the {strategy} run failed:\n{done.stderr[-3000:]}")
        print(f"trained: {strategy}", flush=True)
    for strategy in ("lora", "qlora"):
        merged = work / f"{strategy}-merged"
        done = run([sys.executable, "-m", "finetuning.merge", str(work / strategy), str(merged)])
        if done.returncode:
            sys.exit(f"{strategy} was not merged:\n{done.stderr[-3000:]}")
    return {
        "full": work / "full",
        "frozen": work / "frozen",
        "checkpoint-1 of full": work / "full" / "checkpoint-1",
        "LoRA, merged": work / "lora-merged",
        "QLoRA, merged": work / "qlora-merged",
        "LoRA adapter": work / "lora",
        "QLoRA adapter": work / "qlora",
        "checkpoint-1 of LoRA, adapter": work / "lora" / "checkpoint-1",
    }


def python_of(environment: str, home: Path) -> str:
    """The interpreter of a consumer's environment, which is made where it is missing."""
    if environment == HERE:
        return sys.executable
    python = home / environment / "bin" / "python"
    if not python.exists():
        venv.create(home / environment, with_pip=True)
        lines = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
        given = {requirement.split("=")[0].split("<")[0] for requirement in ENVIRONMENTS[environment]}
        pins = [line for line in lines if line.split("==")[0] in set(PINS) - given]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pins, *ENVIRONMENTS[environment]], check=True)
    return str(python)


def compare(found: dict[str, Any], expected: dict[str, Any], tokenizer) -> dict[str, Any]:
    """How far a consumer is from the reference, of what it gives."""
    pairs = list(zip(found["cases"], expected["cases"], strict=True))
    result: dict[str, Any] = {"asked": found["asked"]}
    if "ids" in found["cases"][0]:
        result["ids_equal"] = all(a["ids"] == b["ids"] for a, b in pairs)
        if result["ids_equal"]:
            deviation = max(float((a["logits"] - b["logits"]).abs().max()) for a, b in pairs)
            result["largest_logit_deviation"] = float(f"{deviation:.2g}")
        result["answers_equal"] = all(a["new"] == b["new"] for a, b in pairs)
    elif "ids_of_text" in found["cases"][0]:
        texts = [[token for token in b["ids"] if token != tokenizer.image_token_id] for _, b in pairs]
        result["ids_equal"] = [a["ids_of_text"] for a, _ in pairs] == texts
    else:
        texts = [tokenizer.decode(b["new"], skip_special_tokens=True).strip() for _, b in pairs]
        result["answers_equal"] = [a["text"].strip() for a, _ in pairs] == texts
    equal = all(value for key, value in result.items() if key.endswith("_equal"))
    return {"works": equal and not found["asked"] and result.get("largest_logit_deviation", 0) <= 1e-4} | result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="folder with the official code")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venvs")
    parser.add_argument("--work", type=Path, help="folder to keep what is made; one that exists is used again")
    parser.add_argument("--result", type=Path, default=RESULTS / "consumers.json")
    args = parser.parse_args()
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = measure(work, args.environments.absolute(), args.official and args.official.absolute())
    kept = json.loads(args.result.read_text()).get("others", {}) if args.result.exists() else {}
    versions = provenance("torch", "transformers", "peft", "tokenizers")
    if args.official:
        # Which copy it was.
        paths = sorted(args.official.glob("*_phi3_v.py"))
        versions["official_sha256"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    # `others`: consumers that other commands measure, vLLM and TRL.
    write(args.result, {**versions, "environments": ENVIRONMENTS, "consumers": rows, "others": kept})


def measure(work: Path, environments: Path, code: Path | None) -> dict[str, dict[str, Any]]:
    """Each consumer's result for each folder that it can read."""
    work.mkdir(parents=True, exist_ok=True)
    found = work / "folders.json"
    if not found.exists():
        found.write_text(json.dumps({name: str(path) for name, path in build_folders(work).items()}))
    folders = {name: Path(path) for name, path in json.loads(found.read_text()).items()}
    cases = work / "cases" / "cases.json" if (work / "cases").exists() else build_cases(work / "cases")
    tokenizer = Phi3VProcessor.from_pretrained(work / "full", trust_remote_code=False)
    rows: dict[str, dict[str, Any]] = {}
    for folder_name, folder in folders.items():
        adapter, expected = "adapter" in folder_name, None
        for name, (consumer, environment) in (ADAPTER_CONSUMERS if adapter else CONSUMERS).items():
            if consumer.startswith("official") and code is None:
                continue
            result = work / "read.pt"
            result.unlink(missing_ok=True)
            command = [
                python_of(environment, environments),
                "benchmarks/reader.py",
                consumer,
                str(folder),
                str(cases),
                str(result),
            ]
            command += ["--base", str(work / "base")] if adapter else []
            command += ["--code", str(code)] if consumer.startswith("official") else []
            done = run(command)
            row: dict[str, Any] = {"works": False, "fault": (done.stderr.strip().splitlines() or [""])[-1][:300]}
            if done.returncode == 0:
                read = torch.load(result)
                expected = expected or read
                row = compare(read, expected, tokenizer)
            shown = ["python", *command[1:3], str(folder.relative_to(work)), "CASES", "RESULT"]
            shown += ["--base", "base"] if adapter else []
            row["command"] = f"{environment}/bin/{shlex.join(shown)}"
            rows.setdefault(name, {})[folder_name] = row
            print(
                f"{folder_name}: {name}: { ({key: value for key, value in row.items() if key != 'command'}) }",
                flush=True,
            )
    return rows


if __name__ == "__main__":
    main()
