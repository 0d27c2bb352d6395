"""vLLM with the plugin answers as generate() does: `make test-serve`, in an environment of its own.

Offline first, in this process; then a server on the loopback, asked as any client of the OpenAI API asks.
"""

import base64
import io
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is installed by make test-serve, in an environment of its own")

import requests
from cases import (
    NEW_TOKENS,
    NUM_CROPS,
    as_openai,
    as_uri,
    chat,
    conversations,
    differences,
    expected_answers,
    images_of,
    meme,
    page,
    prompt_of,
)
from PIL import Image
from server import ask_all, serve

from phi3v import Phi3VProcessor

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def expected(folder):
    found = expected_answers(folder)
    assert len({tuple(answer) for _, answer in found.values()}) > len(found) // 2, "answers that depend on the question"
    return found


def test_at_least_20_pages_memes_pairs_and_clips_are_asked():
    kinds = [name.split()[0] for name in conversations()]
    assert sum(kind in ("page", "meme", "pair", "clip") for kind in kinds) >= 20
    assert {"page", "meme", "pair", "clip", "text"} <= set(kinds)


def test_offline_answers_are_those_of_generate_token_for_token(folder, monkeypatch):
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
        mm_processor_kwargs={"num_crops": 2},  # instead of the folder's 1, which the server has
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
    assert_same(found, expected_answers(folder, num_crops=2))


def assert_same(found: dict, expected: dict) -> None:
    different = differences(found, expected)
    assert not different, "\n".join(f"{name}: {what}" for name, what in different.items())


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """Address of a server on the loopback, which ends with the tests."""
    with serve(folder, tmp_path_factory.mktemp("server") / "log") as address:
        yield address


def test_eight_clients_of_the_server_get_the_answers_of_generate_token_for_token(folder, server, expected):
    assert_same(ask_all(server, Phi3VProcessor.from_pretrained(folder)), expected)


def post(server: str, messages: list[dict], **more) -> requests.Response:
    request = {"model": "phi3v", "messages": messages, "temperature": 0, "max_tokens": 4, "add_special_tokens": True}
    return requests.post(f"{server}/v1/chat/completions", json={**request, **more}, timeout=300)


def with_url(url: str) -> list[dict]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]


def cut_short(image: Image.Image) -> str:
    data = base64.b64decode(as_uri(image).partition(",")[2])
    return "data:image/png;base64," + base64.b64encode(data[: len(data) // 2]).decode()


def bomb() -> str:
    """A small file of 900 million pixels."""
    file = io.BytesIO()
    Image.new("1", (30000, 30000)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


ASKED = as_openai(chat([page(1), "What is it?"]))
REFUSED = {
    "the tag of its own picture in the text": (as_openai(chat([page(1), "What is <|image_1|>?"])), {}, "stands twice"),
    "the tag of another picture": (as_openai(chat([page(1), "What is <|image_2|>?"])), {}, "expected <|image_1|>"),
    "image tag 0": (as_openai(chat([page(1), "<|image_0|>"])), {}, "expected <|image_1|>"),
    "more pictures than allowed": (as_openai(chat([*([meme(0)] * 10), "?"])), {}, "At most 9 image"),
    "num_crops 0": (ASKED, {"mm_processor_kwargs": {"num_crops": 0}}, "num_crops is 0: expected a whole number from 1"),
    "num_crops 1000": (ASKED, {"mm_processor_kwargs": {"num_crops": 1000}}, "num_crops is 1000: expected"),
    "num_crops as text": (ASKED, {"mm_processor_kwargs": {"num_crops": "4"}}, "num_crops is '4': expected"),
    "no picture at all": (with_url("data:image/png;base64,bm8="), {}, "cannot identify image"),
    "half a picture": (with_url(cut_short(page(1))), {}, "truncated"),
    "no base64": (with_url("data:image/png;base64,@@@@"), {}, "Non-base64"),
    "a bomb": (with_url(bomb()), {}, "decompression bomb"),
    "a file of the server": (with_url("file:///etc/passwd"), {}, "Cannot load local files"),
    "too long a text": (chat("x " * 5000), {}, "maximum context length is 4096"),
    "too many crops": (
        as_openai(chat([*(page(n) for n in range(9)), "?"])),
        {"mm_processor_kwargs": {"num_crops": 16}},
        "exceeds model's maximum context length",
    ),
}


def test_bad_requests_are_answered_with_an_error_and_the_server_lives_on(server):
    good = post(server, ASKED).json()["choices"]
    for name, (messages, more, said) in REFUSED.items():
        answer = post(server, messages, **more)
        assert 400 <= answer.status_code <= 500, name
        assert said in answer.json()["error"]["message"], name
        assert requests.get(f"{server}/health", timeout=60).ok, name
    assert post(server, ASKED).json()["choices"] == good


def test_bad_requests_do_not_change_the_answers_to_others(server):
    good = post(server, ASKED).json()["choices"]
    with ThreadPoolExecutor(8) as clients:
        bad = [clients.submit(post, server, messages, **more) for messages, more, _ in REFUSED.values()]
        found = [clients.submit(post, server, ASKED).result().json()["choices"] for _ in range(4)]
        assert not any(answer.result().ok for answer in bad)
    assert found == [good] * 4


@pytest.mark.parametrize("text", ["What is <|image_1|>?", "What is <|image|>?", "<s></s><|end|><|endoftext|>", ""])
def test_odd_texts_without_a_picture_are_answered_as_texts(server, text):
    assert post(server, chat(text)).ok


def test_the_client_answers_a_picture_and_says_what_the_server_refuses(server, tmp_path):
    page(1).save(tmp_path / "page.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    command = [sys.executable, str(ROOT / "docs" / "ask_server.py"), "page.png", "What is it?", "--url", server]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == post(server, ASKED, max_tokens=64).json()["choices"][0]["message"]["content"].strip()
    command[2] = "broken.png"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "answers 400" in done.stderr
    assert done.stderr.count("\n") == 1


def curl_of_the_docs() -> str:
    (block,) = [block for block in re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL) if "base64 -w0" in block]
    return block


def test_the_curl_command_of_the_docs_answers_a_picture(server, tmp_path):
    page(1).save(tmp_path / "page.png")
    command = curl_of_the_docs().replace("http://127.0.0.1:8000", server)
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"finish_reason":' in done.stdout, done.stdout


def test_vllm_has_the_flags_of_the_docs():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    blocks = re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL)
    commands = [block.replace("\\\n", " ") for block in blocks if block.startswith("vllm serve")]
    assert commands
    for command in commands:
        make_arg_parser(FlexibleArgumentParser()).parse_args(shlex.split(command)[2:])


def test_an_adapter_is_told_to_be_merged(folder, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "processor_config.json").write_text((folder / "processor_config.json").read_text())
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}: expected a whole model, found an adapter")
    assert "Traceback" not in done.stderr
