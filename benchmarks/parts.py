"""Each part of the model frozen, in full or by LoRA: what is trained, resumed, loaded and merged, and what it takes.

    python -m benchmarks.parts                  # all of it, about half an hour on two idle cores
    python -m benchmarks.parts --only demo

For each way to train of `CASES`:
runs     the DocVQA script on the tiny model of the demo, two processes, each part at its rate; the same once more, all its
         processes killed (-9) after a checkpoint and started again: final weights, logged losses and answers compared. Then the result
         is loaded by plain PEFT or transformers and by `finetuning.ask`, and merged: the deviation is the one that
         `finetuning.merge` prints.
memory   a real step (bf16, a photo, --recompute full) on a model with the width of the real one's layers, fewer of them: what
         torch allocates with weights, gradients and AdamW's states, and the planner's figure beside it.
demo     from the weights of the demo's full run, one pass over its 4,000 pages with their colours inverted, which it has never
         seen so: ANLS on 200 others before and after, seconds of training.

Units: GB are 10^9 bytes. Written, as it grows: benchmarks/results/parts.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image, ImageOps
from safetensors import safe_open

from demo import DEMO_FLAGS, NUM_PROCESSES, build_data, build_model, fine_tune
from finetuning.arguments import PARTS, parse_args
from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.encoding import encode_conversation
from finetuning.training.checkpoint import read_manifest
from finetuning.training.fake_step import Live
from finetuning.training.fitting import Planner, setting_of
from finetuning.training.loading import load_model, load_processor
from finetuning.training.rates import rate_of
from phi3v import Phi3VForCausalLM

from .interrupt import Run, compare, newest, results
from .models import build_folder, sample
from .record import RESULTS, ROOT, provenance, write

LORA = ["--lora_rank", "8"]
DORA, RSLORA, PISSA = (
    ["--lora_kwargs", json.dumps(fields)]
    for fields in ({"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"})
)


def _named(vision: str, projector: str, language: str, *more: str) -> list[str]:
    lora = LORA if "lora" in (vision, projector, language) else []
    return ["--vision", vision, "--projector", projector, "--language", language, *lora, *more]


CASES = {
    "full": [],
    "vision frozen": _named("frozen", "frozen", "full"),
    "LoRA": _named("lora", "lora", "lora"),
    "QLoRA": _named("lora", "lora", "lora", "--use_qlora"),
    "vision and projector full, language LoRA": _named("full", "full", "lora"),
    "projector full, language LoRA": _named("frozen", "full", "lora"),
    "projector full, language QLoRA": _named("frozen", "full", "lora", "--use_qlora"),
    "projector only": _named("frozen", "full", "frozen"),
    "vision and projector full, language frozen": _named("full", "full", "frozen"),
    "vision LoRA only": _named("lora", "frozen", "frozen"),
    "DoRA": _named("lora", "lora", "lora", *DORA),
    "rsLoRA": _named("lora", "lora", "lora", *RSLORA),
    "PiSSA": _named("lora", "lora", "lora", *PISSA),
    "QLoRA with DoRA": _named("lora", "lora", "lora", "--use_qlora", *DORA),
}
RATES = {"vision": "2e-4", "projector": "5e-4"}


def rates(flags: list[str]) -> list[str]:
    """The rates of the parts that are trained."""
    frozen = {part for part in RATES if f"--{part} frozen" in " ".join(flags)}
    return [word for part, rate in RATES.items() if part not in frozen for word in (f"--{part}_learning_rate", rate)]


def kill_and_go_on(folder: Path, name: str, flags: list[str]) -> dict[str, Any]:
    """The run undisturbed, and killed and started again; what they left, compared."""
    output = folder / re.sub(r"\W+", "-", name)
    whole = Run(folder, output, flags)
    if whole.wait():
        sys.exit(f"{name}: the run failed:\n{output.with_suffix('.log').read_text()[-3000:]}")
    killed = output.with_name(f"{output.name}-killed")
    run = Run(folder, killed, flags)
    while run.wait(0.02) is None and read_manifest(killed / "checkpoint-2") is None:
        pass
    ended = run.process.returncode is not None
    if not ended:
        run.kill()
    at = newest(killed)
    if Run(folder, killed, flags).wait():
        sys.exit(f"{name}: started again, the run failed:\n{killed.with_suffix('.log').read_text()[-3000:]}")
    went_on = f"going on from {killed / str(at)}" in killed.with_suffix(".log").read_text()
    return {"killed_after": None if ended else at, "went_on": went_on, **compare(killed, results(output))}


def load_and_merge(folder: Path, name: str) -> dict[str, Any]:
    """Who loads the result, and what merging it changes."""
    output, base = folder / re.sub(r"\W+", "-", name), folder / "model"
    found: dict[str, Any] = {}
    adapter = (output / "adapter_config.json").exists()
    if adapter:
        PeftModel.from_pretrained(Phi3VForCausalLM.from_pretrained(base, trust_remote_code=False), output)
        found["loads"] = ["PEFT"]
        config = json.loads((output / "adapter_config.json").read_text())
        found["modules_to_save"] = len(config.get("modules_to_save") or [])
    else:
        Phi3VForCausalLM.from_pretrained(output, trust_remote_code=False)
        found["loads"] = ["transformers"]
    picture = folder / "data" / "images" / "test_0000.png"
    asked = [sys.executable, "-m", "finetuning.ask", str(output), "--image", str(picture), "What is the number?"]
    subprocess.run(asked, cwd=ROOT, check=True, capture_output=True)
    found["loads"].append("finetuning.ask")
    weights = next(output.glob("*model.safetensors"))
    found["saved_mb"] = round(weights.stat().st_size / 1e6, 3)
    if adapter:
        merged = output.with_name(f"{output.name}-merged")
        command = [sys.executable, "-m", "finetuning.merge", str(output), str(merged)]
        said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        line = next(line for line in said.splitlines() if "held against base and adapter" in line)
        found["merged"] = {
            "largest_logit_deviation": float(re.search(r"deviation (\S+)", line)[1]),  # type: ignore[index]
            "answers_the_same": re.search(r"(\d of \d) answers", line)[1],  # type: ignore[index]
            "official_names": names(merged / "model.safetensors") == names(base / "model.safetensors"),
        }
    return found


def names(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


def step_memory(folder: Path, flags: list[str]) -> dict[str, Any]:
    """What a step takes, really and by the plan."""
    given = ["--model_name_or_path", str(folder), "--output_dir", str(folder.with_name("memory")), "--no-tqdm"]
    args = parse_args([*given, "--bf16", "--deepspeed", "none", "--num_crops", "4", *flags])
    processor, model = load_processor(args), load_model(args).train()
    features = encode_conversation(sample("photo", 0), processor)
    batch = DataCollatorForPhi3V(processor.tokenizer.pad_token_id)([features])
    batch = {name: value for name, value in batch.items() if torch.is_tensor(value) and name != "attention_mask"}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda found: setattr(found, "grad", None))
    model.activation_checkpointing_enable()
    live = Live()
    live.begin(model)
    start = time.monotonic()
    with live:
        inputs = {name: value.clone() for name, value in batch.items()}
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
    seconds = time.monotonic() - start
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # A gradient and two moments of each weight, in its own dtype.
    states = 3 * sum(parameter.nbytes for parameter in trained)
    base = model.get_base_model() if args.use_lora else model
    labels = sum(label != -100 for label in features["labels"])
    start = time.monotonic()
    planner = Planner(base.config, args, 1, len(features["input_ids"]), len(batch["pixel_values"]), labels)
    planned = planner.memory(setting_of(args, "full")).peak
    return {
        "trained": sum(parameter.numel() for parameter in trained),
        "measured_gb": round((weights + states + live.peak) / 1e9, 3),
        "planned_gb": round(planned / 1e9, 3),
        "step_seconds": round(seconds, 1),
        "planning_seconds": round(time.monotonic() - start, 1),
    }


def invert(folder: Path) -> Path:
    """Inverts the colours of all pages of a data set."""
    for path in (folder / "images").iterdir():
        with Image.open(path) as page:
            ImageOps.invert(page.convert("RGB")).save(path, compress_level=1)
    return folder


def demo_run(folder: Path, name: str, flags: list[str]) -> dict[str, Any]:
    """A pass over the inverted pages from the weights of the demo's full run."""
    output = folder / "demo" / re.sub(r"\W+", "-", name)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_PROCESSES}"),
        *("finetune_hf_trainer_docvqa.py", "--model_name_or_path", str(folder / "trained")),
        *("--data_dir", str(folder / "inverted"), "--output_dir", str(output), *DEMO_FLAGS),
        *("--learning_rate", "1e-3", "--num_train_epochs", "1", *flags),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    scores = [json.loads((output / f"eval_{stage}.json").read_text())["anls"] for stage in ("before", "after")]
    return {
        "anls_before": round(scores[0], 4),
        "anls_after": round(scores[1], 4),
        "train_seconds": round(next(entry["train_runtime"] for entry in history if "train_runtime" in entry), 1),
    }


def main() -> None:
    """Measures what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help="some of the ways to train")
    parser.add_argument("--only", choices=("runs", "memory", "demo"), help="one of the three")
    parser.add_argument(
        "--folder", type=Path, help="where to work, and to keep what was built (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "parts.json")
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.out.exists() else {"cases": {}}
    result = provenance("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes") | {
        "cases": result["cases"]
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        build_model(folder / "model")
        if options.only in (None, "runs") and not (folder / "data").exists():
            build_data(folder / "data", num_train=32, num_test=6)
        if options.only in (None, "memory"):
            medium = build_folder("medium", folder / "medium", torch.bfloat16)
        if options.only in (None, "demo") and not (folder / "trained").exists():
            work = folder / "first"
            build_model(work / "model")
            build_data(work / "data")
            fine_tune(work, "full").rename(folder / "trained")
        if options.only in (None, "demo") and not (folder / "inverted").exists():
            invert(build_data(folder / "partial")).rename(folder / "inverted")
        for name in options.cases or CASES:
            flags = CASES[name]
            given = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "none")]
            args = parse_args([*given, *flags, *rates(flags)])
            trained = {part: f"{rate_of(args, part):g}" for part in PARTS if getattr(args, part) != "frozen"}
            case = result["cases"].setdefault(name, {})
            case |= {"strategy": args.strategy, "flags": " ".join(flags), "rates": trained}
            if options.only in (None, "runs"):
                case["resumed"] = kill_and_go_on(folder, name, [*flags, *rates(flags)])
                case |= load_and_merge(folder, name)
            if options.only in (None, "memory"):
                case["memory"] = step_memory(medium, flags)
            if options.only in (None, "demo"):
                case["demo"] = demo_run(folder, name, flags)
            print(name, json.dumps(case), flush=True)
            write(options.out, result)


if __name__ == "__main__":
    main()
