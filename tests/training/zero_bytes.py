"""What steps of real DeepSpeed allocate at most: python zero_bytes.py CONFIGS PORT, a JSON list; prints one of bytes."""

import json
import os
import sys

import torch

for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
    os.environ[name] = value
os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_PORT": sys.argv[2]}

import deepspeed  # noqa: E402

from finetuning.training.fake_step import Live  # noqa: E402

deepspeed.ops.__compatible_ops__ = {}
LAYERS, WIDTH = 12, 320


def peak(config: dict) -> int:
    torch.manual_seed(0)
    live = Live()
    live.begin(torch.nn.Module())
    with live:
        model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).bfloat16()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for _ in range(3):
            live.peak = live.live
            for _ in range(2):
                loss = engine(torch.ones(1, WIDTH, dtype=torch.bfloat16)).float().sum()
                engine.backward(loss)
                del loss
                engine.step()
    return live.peak


if __name__ == "__main__":
    print("peaks", [peak(config) for config in json.loads(sys.argv[1])])
