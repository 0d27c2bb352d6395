"""vLLM with the plugin answers as generate() does: `make test-serve`, in an environment of its own.

Offline first, in this process; then a server on the loopback, asked as any client of the OpenAI API asks.
"""

import base64
import io
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm", reason="vLLM is installed by make test-serve, in an environment of its own")

import requests
from cases import NEW_TOKENS, NUM_CROPS, build_folder, conversations, expected_answers, images_of, prompt_of

from phi3v import Phi3VProcessor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(folder):
    found = expected_answers(folder)
    assert len({tuple(answer) for _, answer in found.values()}) > len(found) // 2, "answers that depend on the question"
    return found


def test_offline_answers_are_those_of_generate_token_for_token(folder, expected, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    processor = Phi3VProcessor.from_pretrained(folder)
    # A prompt that could grow past 4096 tokens would make vLLM take the long rope factors from the start.
    llm = LLM(
        str(folder),
        max_model_len=4096,
        dtype="float32",
        enforce_eager=True,
        limit_mm_per_prompt={"image": 9},
        max_num_seqs=8,
    )
    prompts = []
    for name, messages in conversations().items():
        prompt = {"prompt": prompt_of(processor, messages)}
        if images := images_of(messages):
            prompt["multi_modal_data"] = {"image": images}
        if name in NUM_CROPS:
            prompt["mm_processor_kwargs"] = {"num_crops": NUM_CROPS[name]}
        prompts.append(prompt)
    # generate() never writes <|image|>, by its own configuration.
    settings = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logit_bias={processor.image_token_id: -100}
    )
    outputs = llm.generate(prompts, settings)
    found = {
        name: (output.prompt_token_ids, list(output.outputs[0].token_ids))
        for name, output in zip(conversations(), outputs, strict=True)
    }
    assert_same(found, expected)


def assert_same(found: dict, expected: dict) -> None:
    """Ids of prompts and answers; all that differ are named."""
    different = {}
    for name, (prompt, answer) in expected.items():
        if found[name][0] != prompt:
            different[name] = f"prompt {found[name][0]}, expected {prompt}"
        elif found[name][1] != answer:
            different[name] = f"answer {found[name][1]}, expected {answer}"
    assert not different, "\n".join(f"{name}: {what}" for name, what in different.items())


START_SECONDS = 400


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """Address of a server on the loopback, which ends with the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not the command `vllm`: that of the build for CPUs looks for the version of a package `vllm`, which it is not.
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--served-model-name", "phi3v"),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "4096", "--max-num-seqs", "8"),
        *("--dtype", "float32", "--enforce-eager", "--limit-mm-per-prompt", '{"image": 9}'),
        "--trust-request-mm-kwargs",  # a request may choose num_crops; off by default, since it costs the server time
    ]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
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
            except requests.ConnectionError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def as_openai(messages: list[dict]) -> list[dict]:
    """The same messages with images as data URIs, as the OpenAI API takes them."""

    def part(content):
        if content["type"] == "text":
            return content
        file = io.BytesIO()
        content["image"].save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    contents = [message["content"] for message in messages]
    return [
        {**message, "content": content if isinstance(content, str) else [part(piece) for piece in content]}
        for message, content in zip(messages, contents, strict=True)
    ]


def test_eight_clients_of_the_server_get_the_answers_of_generate_token_for_token(folder, server, expected):
    processor = Phi3VProcessor.from_pretrained(folder)

    def ask(item):
        name, messages = item
        request = {
            "model": "phi3v",
            "messages": as_openai(messages),
            "temperature": 0,
            "max_tokens": NEW_TOKENS,
            "ignore_eos": True,
            "logit_bias": {str(processor.image_token_id): -100},
            "return_token_ids": True,
            # The template writes no BOS, and without images vLLM adds it only where it is told to.
            "add_special_tokens": True,
        }
        if name in NUM_CROPS:
            request["mm_processor_kwargs"] = {"num_crops": NUM_CROPS[name]}
        answer = requests.post(f"{server}/v1/chat/completions", json=request, timeout=600)
        assert answer.ok, answer.text
        return answer.json()["prompt_token_ids"], answer.json()["choices"][0]["token_ids"]

    asked = conversations()
    with ThreadPoolExecutor(8) as clients:
        found = dict(zip(asked, clients.map(ask, asked.items()), strict=True))
    assert_same(found, expected)
