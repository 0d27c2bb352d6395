"""Starts the server of `make serve` on the loopback, and ends it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import requests
from cases import conversations, request_of

from phi3v import Phi3VProcessor

START_SECONDS = 400


@contextmanager
def serve(folder: Path, log: Path, *flags: str) -> Iterator[str]:
    """Address of a server for a model folder, which ends with the block.

    Args:
        folder (Path): the model.
        log (Path): file for what the server prints.
        *flags (str): further flags of the server.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not the command `vllm`: that of the build for CPUs looks for the version of a package `vllm`, which it is not.
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--served-model-name", "phi3v", "--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", "4096", "--max-num-seqs", "8", "--dtype", "float32", "--enforce-eager"),
        *("--limit-mm-per-prompt", '{"image": 9}'),
        *("--media-io-kwargs", '{"image": {"image_mode": null}}'),  # Phi3VProcessor makes them RGB, as in training
        "--trust-request-mm-kwargs",  # a request may choose num_crops; off by default, since it costs the server time
        *flags,
    ]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while True:
            assert process.poll() is None, f"the server ended: {log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"no answer within {START_SECONDS} s: {log.read_text()[-3000:]}"
            try:
                if requests.get(f"{address}/health", timeout=5).ok:
                    break
            except requests.RequestException:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def ask_all(address: str, processor: Phi3VProcessor, clients: int = 8) -> dict[str, tuple[list[int], list[int]]]:
    """By conversation the ids of its prompt and of the server's answer, asked by so many clients at once."""

    def ask(item):
        request = request_of(processor, *item)
        answer = requests.post(f"{address}/v1/chat/completions", json=request, timeout=600)
        assert answer.ok, answer.text
        return answer.json()["prompt_token_ids"], answer.json()["choices"][0]["token_ids"]

    asked = conversations()
    with ThreadPoolExecutor(clients) as pool:
        return dict(zip(asked, pool.map(ask, asked.items()), strict=True))
