"""A server for prompts past 4,096 tokens. In a file of its own: the server of test_vllm.py has ended then."""

import re

import pytest

pytest.importorskip("vllm", reason="vLLM is installed by make test-serve, in an environment of its own")

import requests
from cases import NEW_TOKENS, chat, images_of, load, page, prompt_of, request_of
from server import serve


def test_past_4096_tokens_the_server_says_what_it_does_and_answers_as_generate(folder, tmp_path):
    messages = chat([*(page(n, (320, 240)) for n in range(8)), "Classify the video."])
    model, processor = load(folder)
    inputs = processor(prompt_of(processor, messages), images_of(messages), num_crops=4)
    length = inputs["input_ids"].shape[1]
    assert length > 8 * 757
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
    request = request_of(processor, "long", messages) | {"mm_processor_kwargs": {"num_crops": 4}}
    with serve(folder, tmp_path / "log", "--max-model-len", "8192") as address:
        answer = requests.post(f"{address}/v1/chat/completions", json=request, timeout=900)
    assert answer.ok, answer.text
    assert answer.json()["prompt_token_ids"] == ids[:length]
    assert answer.json()["choices"][0]["token_ids"] == ids[length:]
    assert re.search(r"Using LongRoPE scaling factors.*at most 4096", (tmp_path / "log").read_text())
