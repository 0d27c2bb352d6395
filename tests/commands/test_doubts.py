"""`python -m finetuning.doubts`: likelihoods by a naive loop, order, twins, going on, folds, and bad calls."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recipe
import saved
import torch

import finetune_hf_trainer_docvqa as docvqa
from finetuning import doubts
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.encoding import encode_conversation
from finetuning.data.reading import read_splits
from finetuning.errors import Stopped
from finetuning.results import judging
from finetuning.training.loading import open_model, read_processor
from finetuning.training.saved import find_saved

own_process = pytest.fixture(autouse=True)(recipe.own_process)
FLAGS = ["--task", "docvqa", "--no-tqdm", "--max_new_tokens", "6", "--num_crops", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipe.model_folder(tmp_path_factory.mktemp("doubts") / "base")


@pytest.fixture
def data(tmp_path):
    """Seven pages; the last two are asked the same about the same page, and answered differently."""
    folder = recipe.docvqa_rows(tmp_path / "data", train=6, test=1)
    rows = read(folder / "rows.jsonl")
    rows.append({**rows[4], "id": "twin", "answers": ["another answer"]})
    recipe.write_jsonl(folder / "rows.jsonl", rows)
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained_likelihood(model, processor, conversation: Conversation, answer: str) -> float:
    """Mean log-probability of the labels of one trained sample, without the `<|endoftext|>` after the conversation."""
    turn = conversation.turns[-1]
    turns = [*conversation.turns[:-1], Turn(turn.user, [answer], turn.images)]
    features = encode_conversation(Conversation(conversation.id, turns), processor)
    labelled = [place for place, label in enumerate(features["labels"][:-1]) if label != -100]
    # The last run of them: the last turn's.
    starts = [place for place in labelled if place - 1 not in labelled]
    kept, labels = [place for place in labelled if place >= starts[-1]], features["labels"]
    with torch.no_grad():
        # Up to the answer's <|end|>: what follows may take the tiny model past its 64 tokens, where other rope factors begin.
        logits = model(
            input_ids=torch.tensor([features["input_ids"][: kept[-1] + 1]]),
            pixel_values=features["pixel_values"],
            image_sizes=features["image_sizes"],
        ).logits[0]
    values = [float(logits[place - 1].double().log_softmax(-1)[labels[place]]) for place in kept]
    return sum(values) / len(values)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_likelihoods_are_those_of_the_trained_tokens_one_sample_at_a_time(kind, base, data, tmp_path, monkeypatch):
    folder = base if kind == "whole" else saved.adapter_folder(base, tmp_path / "adapter")
    saved.call(monkeypatch, doubts, folder, *FLAGS, "--data_dir", data, "--output_dir", tmp_path / "out")
    found = read(tmp_path / "out/doubts.jsonl")
    assert len(found) == 7
    assert [item["doubt"] for item in found] == sorted((item["doubt"] for item in found), reverse=True)
    opened = find_saved(str(folder))
    model, processor = (
        open_model(opened, torch.float32, False, torch.device("cpu")),
        read_processor(opened, 2),
    )
    rows = {row["id"]: docvqa.to_conversation(row) for row in read_splits(data)[0]}
    for item in found:
        conversation = rows[item["id"]]
        given = [trained_likelihood(model, processor, conversation, answer) for answer in item["answers"]]
        assert item["log_likelihoods"] == pytest.approx(given, abs=1e-4)
        assert item["doubt"] == pytest.approx(item["model_log_likelihood"] - max(given), abs=1e-4)


def test_each_turn_is_judged_after_the_earlier_ones_as_they_are_given(base, data, tmp_path, monkeypatch):
    texts = [("Which page is it?", "4"), ("And the next?", "page 5"), ("The one before?", "3")]
    turns = [{"user": user, "assistant": answer, "images": []} for user, answer in texts]
    turns[0]["images"] = ["4.png"]
    recipe.write_jsonl(data / "rows.jsonl", [{"id": "chat", "split": "train", "conversations": turns}])
    saved.call(monkeypatch, doubts, base, *FLAGS, "--data_dir", data, "--output_dir", tmp_path / "out")
    found = {item["turn"]: item["log_likelihoods"] for item in read(tmp_path / "out/doubts.jsonl")}
    opened = find_saved(str(base))
    model, processor = open_model(opened, torch.float32, False, torch.device("cpu")), read_processor(opened, 2)
    (conversation,) = map(docvqa.to_conversation, read_splits(data, None, "train")[1])
    for number, (_, answer) in enumerate(texts):
        until = Conversation("chat", conversation.turns[: number + 1])
        assert found[number] == pytest.approx([trained_likelihood(model, processor, until, answer)], abs=1e-4)


def test_the_models_own_answer_is_as_likely_as_its_greedy_tokens(base, data, tmp_path, monkeypatch):
    saved.call(monkeypatch, doubts, base, *FLAGS, "--data_dir", data, "--output_dir", tmp_path / "out")
    opened = find_saved(str(base))
    model, processor = open_model(opened, torch.float32, False, torch.device("cpu")), read_processor(opened, 2)
    end = model.generation_config.eos_token_id
    rows = {row["id"]: row for row in read_splits(data)[0]}
    for item in read(tmp_path / "out/doubts.jsonl"):
        row = rows[item["id"]]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": f"<|image_1|>\n{item['question']}"}], add_generation_prompt=True
        )
        inputs = processor(prompt, [recipe.Image.open(row["image"]).convert("RGB")])
        ids, values = inputs["input_ids"], []
        # Without a cache, a token at a time.
        for _ in range(6):
            with torch.no_grad():
                logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, -1]
            token = int(logits.argmax())
            values.append(float(logits.double().log_softmax(-1)[token]))
            ids = torch.cat((ids, torch.tensor([[token]])), 1)
            if token in ([end] if isinstance(end, int) else end):
                break
        text = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert item["model_answer"] == text
        assert item["model_log_likelihood"] == pytest.approx(sum(values) / len(values), abs=1e-4)


def test_the_same_page_with_another_answer_is_named_beside_it(base, data, tmp_path, monkeypatch, capsys):
    saved.call(monkeypatch, doubts, base, *FLAGS, "--data_dir", data, "--output_dir", tmp_path / "out")
    found = {item["id"]: item for item in read(tmp_path / "out/doubts.jsonl")}
    assert {name: [twin["id"] for twin in item["twins"]] for name, item in found.items() if item["twins"]} == {
        "twin": ["page-4"],
        "page-4": ["twin"],
    }
    assert found["page-4"]["twins"][0] | {"where": ""} == {
        "id": "twin", "turn": 0, "where": "", "answers": ["another answer"], "bits": -1,
    }  # fmt: skip
    assert found["twin"]["where"].endswith("rows.jsonl:8")
    assert "other answer: 2 answers" in capsys.readouterr().out


def test_rows_of_ones_own_data_are_judged_without_a_share_held_back(base, data, tmp_path, monkeypatch):
    lines = [f"images/{number}.png,Which page?,{number}" for number in range(6)]
    (data / "pages.csv").write_text("\n".join(["image,question,answer", *lines]) + "\n")
    flags = ["--task", "own_data", *FLAGS[2:], "--data_dir", data / "pages.csv", "--output_dir", tmp_path / "out"]
    saved.call(monkeypatch, doubts, base, *flags)
    found = read(tmp_path / "out/doubts.jsonl")
    assert sorted(item["answers"] for item in found) == [[str(number)] for number in range(6)]
    assert found[0]["where"].rpartition(":")[0] == str(data / "pages.csv")


def test_what_is_judged_is_kept_and_mended_rows_alone_are_judged_again(base, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    call = [base, *FLAGS, "--data_dir", data, "--output_dir", out, "--per_device_eval_batch_size", "2"]
    asked = []
    monkeypatch.setattr(
        judging, "answer_and_judge", lambda *args, judge=judging.answer_and_judge: asked.append(args[3]) or judge(*args)
    )
    saved.call(monkeypatch, doubts, *call)
    first = (out / "doubts.jsonl").read_text()
    assert len(asked) == 4
    # Killed in the middle of a line.
    lines = first.splitlines(keepends=True)
    (out / "doubts.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    asked.clear()
    saved.call(monkeypatch, doubts, *call)
    assert len(asked) == 2
    assert "3 of 7 answers are judged already" in capsys.readouterr().out
    again = read(out / "doubts.jsonl")
    assert {item["id"] for item in again} == {item["id"] for item in map(json.loads, lines)}
    rows = read(data / "rows.jsonl")
    rows[2]["answers"] = ["mended"]
    recipe.write_jsonl(data / "rows.jsonl", rows)
    asked.clear()
    saved.call(monkeypatch, doubts, *call)
    assert asked == [[["mended"]]]
    assert next(item for item in read(out / "doubts.jsonl") if item["id"] == "page-2")["answers"] == ["mended"]
    # Another model judges all.
    asked.clear()
    saved.call(monkeypatch, doubts, saved.adapter_folder(base, tmp_path / "adapter"), *call[1:])
    assert len(asked) == 4
    assert len(read(out / "doubts.jsonl")) == 7


def test_a_signal_stops_it_after_a_round_that_is_kept(base, data, tmp_path, monkeypatch):
    call = [base, *FLAGS, "--data_dir", data, "--output_dir", tmp_path / "out", "--per_device_eval_batch_size", "3"]
    with monkeypatch.context() as patched:
        patched.setattr(judging.stop_signals, "agree", lambda _: signal.SIGTERM)
        with pytest.raises(Stopped, match="3 of 7 judged answers are in .*; the same command goes on"):
            saved.call(patched, doubts, *call)
    assert [item["id"] for item in read(tmp_path / "out/doubts.jsonl")] == ["page-0", "page-1", "page-2"]
    saved.call(monkeypatch, doubts, *call)
    assert len(read(tmp_path / "out/doubts.jsonl")) == 7


def test_a_bad_call_gets_one_line(base, data, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/doubts.jsonl").write_text('{"id": "something else"}\n')
    flags = [*FLAGS, "--data_dir", data]
    calls = {
        "no such folder": ([tmp_path / "gone", *flags], "no such folder"),
        "no script known": ([base, "--data_dir", data], "found no run.json that names it; give --task"),
        "unknown task": ([base, "--task", "docs"], "--task docs: expected docvqa"),
        "one fold": ([base, *flags, "--folds", "1"], "--folds 1: expected 2 to 10"),
        "flag": ([base, *flags, "--max_new_token", "3"], "did you mean --max_new_tokens"),
        "no such split": ([base, *flags, "--split", "trian"], 'expected rows with "split": "trian", found none (only train, test)'),
        "another file": ([base, *flags, "--output_dir", tmp_path / "other"], "found something else in doubts.jsonl, line 1"),
        "out in data": ([base, *flags, "--output_dir", data / "doubts"], "found a folder inside it"),
    }  # fmt: skip
    for name, (argv, says) in calls.items():
        assert says in saved.refusal(monkeypatch, doubts, *argv), name
    assert (tmp_path / "other/doubts.jsonl").read_text() == '{"id": "something else"}\n'


def start(ranks: int, *argv: object) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launcher, "-m", "finetuning.doubts", *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(recipe.ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_folds_judge_rows_that_they_have_not_seen_and_two_processes_go_on_where_they_were_stopped(base, data, tmp_path):
    out = tmp_path / "out"
    call = [base, *FLAGS, "--data_dir", data, "--output_dir", out, "--folds", "2"]
    call += ["--lora_rank", "4", "--batch_size", "4", "--batch_size_per_gpu", "2", "--learning_rate", "1e-2"]
    stopped = start(2, *call)
    # While the second half is trained.
    while not (out / "without-2-of-2").exists() and stopped.poll() is None:
        time.sleep(0.2)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=120)
    assert stopped.returncode
    assert not (out / "doubts.jsonl").exists()
    finished = start(2, *call)
    printed, _ = finished.communicate(timeout=250)
    assert finished.returncode == 0, printed
    found = {item["id"]: item for item in read(out / "doubts.jsonl")}
    assert len(found) == 7
    # Both questions about one page are in one part.
    assert found["twin"]["part"] == found["page-4"]["part"]
    for part in (0, 1):
        import pyarrow.parquet as pq

        trained = set(pq.read_table(out / f"without-{part + 1}-of-2/run_rows.parquet")["id"].to_pylist())
        judged = {name for name, item in found.items() if item["part"] == part}
        assert trained
        assert judged
        assert not trained & judged
        assert trained | judged == set(found)
