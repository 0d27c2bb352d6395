"""Merging an adapter of rank 64 into the model in full size (random weights, bf16) on the CPU: peak memory and time.

    python -m benchmarks.merge [--model medium] [--folder DIR]

Runs `python -m finetuning.merge`, which compares the merged model with the adapter too. Writes benchmarks/results/merge.json.
Needs 30 GB of disk; with --folder base and adapter are kept for the next time.
"""

import argparse
import gc
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from finetuning.arguments import parse_args
from finetuning.training.loading import load_model

from .models import SIZES, build_folder
from .record import RESULTS, ROOT, provenance, write


def build_adapter(base: Path, folder: Path) -> None:
    """Writes an adapter over `base` none of whose weights is zero."""
    flags = ["--use_lora", "--bf16", "--no-tqdm", "--output_dir", str(folder.with_name("output"))]
    model = load_model(parse_args(["--model_name_or_path", str(base), *flags]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.01
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="full")
    parser.add_argument("--folder", type=Path, help="where to build the models (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS / "merge.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        base = build_folder(args.model, folder / f"base-{args.model}", torch.bfloat16)
        gc.collect()
        adapter, merged = folder / f"adapter-{args.model}", folder / f"merged-{args.model}"
        if not (adapter / "adapter_config.json").exists():
            build_adapter(base, adapter)
            gc.collect()
        shutil.rmtree(merged, ignore_errors=True)
        start = time.monotonic()
        command = [sys.executable, "-m", "finetuning.merge", str(adapter), str(merged)]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        seconds = time.monotonic() - start
        # Kilobytes; of the child, which is the only one.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        size = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
        shutil.rmtree(merged)
    result = {
        "model": args.model,
        "weights_gb": round(size / 1e9, 2),
        "peak_memory_gb": round(peak * 1024 / 1e9, 2),
        "seconds": round(seconds),
        "said": [line.replace(str(folder), "DIR") for line in said.splitlines()],
    }
    write(args.out, provenance("torch", "transformers", "peft") | result)
    print(result)


if __name__ == "__main__":
    main()
