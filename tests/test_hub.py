"""Data sets and models of the hub, against a hub on the loopback: what is read, what its faults say, what a cache saves."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import httpx2
import huggingface_hub
import pytest
import recipe
from hub import Fault, Hub, card, cauldron, docvqa, folder_files, parquet, png, use

import convert_ucf101
import finetune_hf_trainer_docvqa
import finetune_hf_trainer_hateful_memes
import finetune_hf_trainer_nlvr2
import finetune_hf_trainer_ucf101
from finetuning.data import download
from finetuning.data.dataset import build_dataset
from finetuning.data.hub import fetch_file, load_hub
from finetuning.errors import InputError
from finetuning.training.loading import load_model, load_processor

ROOT = Path(__file__).parents[1]
DOCVQA, CAULDRON = "nielsr/docvqa_1200_examples", "HuggingFaceM4/the_cauldron"
ROWS = {"docvqa": 5, "hateful_memes": 510, "nlvr2": 506}

pytestmark = pytest.mark.timeout(120)
own_process = pytest.fixture(autouse=True)(recipe.own_process)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return recipe.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def contents(model) -> dict[str, dict[str, bytes]]:
    files = {f"datasets/{DOCVQA}": docvqa(), f"datasets/{CAULDRON}": cauldron(ROWS), "me/tiny": folder_files(model)}
    # Code and pickled weights, which nothing asks for.
    files["me/tiny"] |= {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"no", "old/other.safetensors": b""}
    return files


@pytest.fixture
def hub(contents):
    with Hub() as found:
        for name, files in contents.items():
            found.put(name, files)
        yield found


@pytest.fixture(autouse=True)
def home(hub, tmp_path, monkeypatch) -> Path:
    """An empty cache, and the hub of the test as the endpoint; both are read at import, so they are set afterwards."""
    return use(hub.endpoint, tmp_path / "home", monkeypatch)


@pytest.fixture
def args(model):
    return recipe.arguments(model)


@pytest.fixture
def hasty(monkeypatch):
    """Gives up after 8 seconds in place of 35: a busy machine may take some for a healthy answer."""
    monkeypatch.setattr(download, "STALL_SECONDS", 8)
    monkeypatch.setattr(download, "REQUEST_SECONDS", 2)
    monkeypatch.setattr(download, "RETRY_AFTER", (0.1, 0.1, 0.1))
    yield
    if download._Download.last:
        # A thread that was given up, in the middle of the library's own waits, ends before the next test's hub is asked.
        download._Download.last.done.wait(20)


def refusal(function, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    return message


def questions(rows, to_conversation) -> list[tuple[str, list[str]]]:
    return [(turn.user, turn.answers) for row in rows for turn in to_conversation(row).turns]


# ---- what is read


def test_docvqa_trains_on_train_and_answers_test(args):
    train, test = finetune_hf_trainer_docvqa.load_splits(args)
    to_conversation = finetune_hf_trainer_docvqa.to_conversation
    assert [row["id"] for row in train] == [f"train_{number}" for number in range(6)]
    assert [row["id"] for row in test] == [f"test_{number}" for number in range(3)]
    assert questions(test, to_conversation)[1] == ("Question 1 of test?\nAnswer briefly.", ["test 1", "1"])
    # Undecoded: the picture as it is in the file.
    assert to_conversation(train[0]).images[0]["bytes"].startswith(b"\x89PNG")


def test_docvqa_in_full_trains_on_the_cauldron_and_answers_the_same_rows(model):
    args = recipe.arguments(model, "--full_train")
    train, test = finetune_hf_trainer_docvqa.load_splits(args)
    assert [row["id"] for row in test] == [f"test_{number}" for number in range(3)]
    assert [row["id"] for row in train] == [f"docvqa-{number}" for number in range(ROWS["docvqa"])]
    asked = questions(train, finetune_hf_trainer_docvqa.to_conversation)
    assert asked[:2] == [
        ("What is page 0?\nAnswer briefly.", ["Page 0"]),
        ("Who wrote 0?\nAnswer briefly.", ["Nobody"]),
    ]


@pytest.mark.parametrize(
    ("script", "config", "first", "images"),
    [
        (finetune_hf_trainer_nlvr2, "nlvr2", "Is statement {n} true?", 2),
        (finetune_hf_trainer_hateful_memes, "hateful_memes", "Is the meme {n} hateful?", 1),
    ],
)
def test_no_row_is_both_trained_and_answered(args, script, config, first, images):
    train, test = script.load_splits(args)
    assert [row["id"] for row in test] == [f"{config}-{number}" for number in range(500)]
    assert [row["id"] for row in train] == [f"{config}-{number}" for number in range(500, ROWS[config])]
    conversation = script.to_conversation(train[0])
    assert conversation.turns[0].user.startswith(first.format(n=500))
    assert [image["bytes"][:4] for image in conversation.images] == [b"\x89PNG"] * images


def test_ucf101_asks_nothing_of_the_hub(hub, args):
    assert "convert_ucf101.py" in refusal(finetune_hf_trainer_ucf101.load_splits, args)
    assert hub.requests == []


def test_the_archive_of_ucf101(hub):
    hub.put(f"datasets/{convert_ucf101.REPO}", {convert_ucf101.ARCHIVE: b"x" * 50_000, "other.bin": b"no"})
    assert convert_ucf101.fetch().read_bytes() == b"x" * 50_000
    assert not any("other.bin" in request for request in hub.requests)
    hub.fault = Fault("silent")
    assert convert_ucf101.fetch().stat().st_size == 50_000


def test_only_the_files_of_the_configuration_are_fetched(hub, args):
    load_hub(args, CAULDRON, "nlvr2")
    fetched = {
        request.split("/resolve/")[1].split("/", 1)[1]
        for request in hub.requests
        if request.startswith("GET /datasets")
    }
    assert fetched == {"README.md", "nlvr2/train-00000-of-00002.parquet", "nlvr2/train-00001-of-00002.parquet"}


def test_ids_of_the_data_set_are_kept_and_others_made(args):
    assert load_hub(args, DOCVQA, split="test")["id"] == ["test_0", "test_1", "test_2"]
    assert load_hub(args, CAULDRON, "docvqa")["id"][:2] == ["docvqa-0", "docvqa-1"]


def test_another_name_of_a_column_is_one_line_before_a_model_is_loaded(hub, args):
    features = datasets.Features({"images": datasets.List(datasets.Image()), "texts_": datasets.Value("string")})
    rows = [{"images": [{"bytes": png(1), "path": None}] * 2, "texts_": "?"}] * 3
    hub.put("datasets/me/renamed", {"README.md": card([]), "data/train.parquet": parquet(rows, features)})
    train = load_hub(args, "me/renamed")
    to_conversation = finetune_hf_trainer_nlvr2.to_conversation
    assert "texts" in refusal(build_dataset, train, to_conversation, load_processor(args), args, "train")


def test_an_unknown_split_or_configuration_is_named(args):
    assert "test" in refusal(load_hub, args, CAULDRON, "nlvr2", "test")
    message = refusal(load_hub, args, CAULDRON, "nlvr")
    assert "'nlvr'" in message
    assert "nlvr2" in message


# ---- the model


def test_a_model_of_the_hub_is_fetched_without_its_code_and_keeps_its_name(hub):
    args = recipe.arguments("me/tiny", "--use_lora", "--freeze_vision_model")
    assert load_processor(args).image_processor.num_crops == 2
    model = load_model(args)
    assert model.peft_config["default"].base_model_name_or_path == "me/tiny"
    assert not any(name in request for request in hub.requests for name in (".py", ".bin", "old/"))


def test_a_model_in_the_cache_needs_no_hub(hub):
    args = recipe.arguments("me/tiny")
    load_processor(args)
    asked = len(hub.requests)
    hub.fault = Fault("silent")
    start = time.monotonic()
    load_processor(args)
    load_model(args)
    assert time.monotonic() - start < 10
    assert len(hub.requests) == asked


@pytest.mark.usefixtures("hasty")
def test_a_model_that_is_half_in_the_cache_is_completed(hub):
    args = recipe.arguments("me/tiny")
    hub.fault = Fault("500", on="model.safetensors")
    assert "500" in refusal(load_processor, args)
    hub.fault = None
    load_processor(args)
    assert load_model(args)


# ---- what the cache saves


@pytest.mark.parametrize("kind", ["silent", "refused", "401"])
def test_a_full_cache_never_waits_for_the_hub(hub, home, args, kind, monkeypatch):
    rows = finetune_hf_trainer_nlvr2.load_splits(args)
    asked = len(hub.requests)
    if kind == "refused":
        use("http://127.0.0.1:9", home, monkeypatch)
    hub.fault = Fault(kind)
    start = time.monotonic()
    again = finetune_hf_trainer_nlvr2.load_splits(args)
    assert time.monotonic() - start < 5
    assert [part["id"] for part in rows] == [part["id"] for part in again]
    assert len(hub.requests) == asked


def test_a_download_by_the_hubs_own_command_is_enough(hub, args):
    huggingface_hub.snapshot_download(DOCVQA, repo_type="dataset")
    hub.fault = Fault("silent")
    assert load_hub(args, DOCVQA, split="test")["id"] == ["test_0", "test_1", "test_2"]


def test_the_copy_is_enough_when_the_files_of_the_hub_are_removed(hub, home, args):
    """Half of the disk that a data set takes is free again after the first start."""
    before = list(load_hub(args, DOCVQA))
    downloaded = [path for path in (home / "hub").rglob("*.parquet") if path.is_file()]
    assert downloaded
    shutil.rmtree(home / "hub")
    hub.fault = Fault("silent")
    assert list(load_hub(args, DOCVQA)) == before


def test_half_a_download_by_the_hubs_own_command_is_not_taken_for_all(args):
    huggingface_hub.snapshot_download(CAULDRON, repo_type="dataset", allow_patterns=["README.md", "nlvr2/*00000-of*"])
    assert len(load_hub(args, CAULDRON, "nlvr2")) == ROWS["nlvr2"]


def test_offline_without_a_cache_is_one_line_at_once(hub, home, args, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal(load_hub, args, DOCVQA)
    assert "HF_HUB_OFFLINE is set" in message
    assert str(home) in message
    assert hub.requests == []


# ---- faults


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("401"), ["401", "gated or private", "HF_TOKEN"]),
        (Fault("401", on="/resolve/"), ["401", "gated or private", "HF_TOKEN"]),
        (Fault("403", on=".parquet"), ["403", "gated or private", "HF_TOKEN"]),
        (Fault("404"), ["no such repository", "HF_TOKEN"]),
        (Fault("500"), ["500"]),
        (Fault("500", on=".parquet"), ["500"]),
        (Fault("silent"), ["no answer"]),
        (Fault("silent", on=".parquet"), ["no answer"]),
        (Fault("silent", on="README.md"), ["no answer"]),
        (Fault("drip", on=".parquet"), ["at most", "bytes in 8 s"]),
        (Fault("drip", on="/api/"), ["at most", "bytes in 8 s"]),
        (Fault("short", on=".parquet"), ["cut short"]),
        (Fault("no_etag", on="/resolve/"), ["ETag"]),
    ],
    ids=lambda value: f"{value.kind}{value.on.replace('/', ' ')}" if isinstance(value, Fault) else "",
)
def test_a_fault_of_the_hub_is_one_line(hub, args, capfd, fault, words):
    hub.fault = fault
    start = time.monotonic()
    message = refusal(load_hub, args, DOCVQA)
    assert time.monotonic() - start < 40
    assert message.startswith(f"{DOCVQA}: expected it from {hub.endpoint}, found: ")
    for word in (*words, "--data_dir"):
        assert word in message
    assert capfd.readouterr().err.strip() == ""


def test_what_is_asked_elsewhere_hides_no_fault_of_the_hub(hub):
    progress = download.Progress()
    client = download._Client(progress)
    with pytest.raises(httpx2.ConnectError):
        client.get("http://127.0.0.1:9")
    assert progress.last_fault.startswith("connection refused")
    hub.fault = Fault("500")
    client.get(f"{hub.endpoint}/api/models")
    with pytest.raises(httpx2.ConnectError):
        client.get("http://127.0.0.1:9")
    assert progress.last_fault.startswith("500")


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("fault", [Fault("401"), Fault("404"), Fault("silent"), Fault("drip", on="tokenizer.json")])
def test_a_fault_of_the_hub_is_one_line_for_a_model_too(hub, fault):
    hub.fault = fault
    message = refusal(load_processor, recipe.arguments("me/tiny"))
    assert message.startswith(f"me/tiny: expected it from {hub.endpoint}, found: ")
    assert "--model_name_or_path FOLDER" in message


@pytest.mark.usefixtures("hasty")
def test_a_hub_that_refuses_connections(home, args, monkeypatch):
    use("http://127.0.0.1:9", home, monkeypatch)
    message = refusal(load_hub, args, DOCVQA)
    assert "http://127.0.0.1:9, found: connection refused" in message
    assert "HF_HUB_OFFLINE=1" in message


@pytest.mark.usefixtures("hasty")
def test_a_hub_whose_name_has_no_address(home, args, monkeypatch):
    use("http://no-such-name.invalid", home, monkeypatch)
    assert "no address" in refusal(load_hub, args, DOCVQA)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("kind", ["cut", "reset", "500", "silent", "short"])
def test_breaks_are_retried(hub, args, kind):
    hub.fault = Fault(kind, on="train-00000-of-00001.parquet", times=2)
    assert len(load_hub(args, DOCVQA)) == 6


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_body_that_breaks_is_resumed_where_it_broke(hub, kind, monkeypatch):
    # Of what has come, whole chunks are kept: 10 MB.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    sent = os.urandom(1_000_000)
    hub.put("datasets/me/big", {"big.bin": sent})
    hub.fault = Fault(kind, on="big.bin", times=4)  # HEAD, then three broken bodies
    path = fetch_one("me/big", "big.bin")
    assert path.read_bytes() == sent
    assert hub.requests.count(f"GET /datasets/me/big/resolve/{hub.repositories['datasets/me/big'].commit}/big.bin") == 4
    assert hub.sent < 1_200_000


def fetch_one(name: str, file: str) -> Path:
    return fetch_file(name, file, "or give it")


@pytest.mark.usefixtures("hasty")
def test_a_long_download_that_goes_on_is_left_alone_and_says_so(hub, capfd, monkeypatch):
    monkeypatch.setattr(download, "FIRST_LINE", 1)
    monkeypatch.setattr(download, "NEXT_LINE", 1)
    monkeypatch.setattr(download, "STALL_SECONDS", 1.5)
    hub.put("datasets/me/slow", {"slow.bin": os.urandom(60_000)})
    hub.fault = Fault("slow", on="slow.bin")
    assert fetch_one("me/slow", "slow.bin").stat().st_size == 60_000
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) >= 2
    assert re.fullmatch(rf"me/slow: slow.bin: 0.0\d of 0.06 MB from {hub.endpoint} in \d s, 0.0\d MB/s", lines[-1])


@pytest.mark.usefixtures("hasty")
def test_a_disk_without_space_is_one_line(args, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetuning.data.hub.snapshot_download", full)
    monkeypatch.setattr("finetuning.data.hub._cached_split", lambda *_: None)
    message = refusal(load_hub, args, DOCVQA)
    assert "No space left on device" in message
    assert "HF_HOME" in message


# ---- several processes

RANKS = """
import sys, time
sys.path.insert(0, {tests!r})
from finetuning.arguments import parse_args
from finetuning.data.hub import fetch_file, load_hub
from finetuning.errors import run_script

def main():
    args = parse_args(["--model_name_or_path", {model!r}, "--batch_size", "3", "--ddp_timeout", "8", "--no-tqdm"])
    rows = load_hub(args, "nielsr/docvqa_1200_examples")
    sys.stdout.write(f"rank {{args.process_index}}: {{len(rows)}} rows\\n")

run_script(main)
"""


def ranks(tmp_path, model, endpoint, **environment) -> tuple[subprocess.CompletedProcess, float]:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(tests=str(ROOT / "tests"), model=str(model)))
    start = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "3",
        "--standalone",
        str(script),
    ]
    found = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )
    return found, time.monotonic() - start


def test_one_rank_fetches_and_the_others_wait_longer_than_a_collective_may(hub, model, tmp_path):
    """20 s of download with a limit of 8 s on each collective operation (--ddp_timeout)."""
    hub.put(f"datasets/{DOCVQA}", docvqa(side=300))
    hub.fault = Fault("slow", on="train-00000-of-00001.parquet")
    hub.seconds = 20
    result, seconds = ranks(tmp_path, model, hub.endpoint)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == [f"rank {rank}: 6 rows" for rank in range(3)]
    assert seconds > 20
    assert sum(request.startswith("GET") and "train-00000" in request for request in hub.requests) == 1


def test_a_fault_of_the_rank_that_fetches_ends_all_with_one_line(hub, model, tmp_path):
    hub.fault = Fault("401", on=".parquet")
    result, seconds = ranks(tmp_path, model, hub.endpoint)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "gated or private" in lines[0]
    assert seconds < 45
    assert "rows" not in result.stdout


# ---- uploads, which the hub of the tests also takes


def test_the_hub_takes_uploads(hub):
    api = huggingface_hub.HfApi(endpoint=hub.endpoint, token="hf_x")
    api.create_repo("me/new")
    api.upload_file(path_or_fileobj=b"text", path_in_repo="README.md", repo_id="me/new")
    assert hub.repositories["me/new"].files == {"README.md": b"text"}
    assert json.loads(json.dumps(hub.requests))
