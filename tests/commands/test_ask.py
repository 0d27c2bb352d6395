"""`python -m finetuning.ask`: one question, a chat, pictures without labels; what it says is what the model says."""

import io
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
import tiny
import torch

from finetuning import ask
from finetuning.data.shown import escape
from finetuning.training.loading import open_model, read_processor
from finetuning.training.saved import find_saved

own_process = pytest.fixture(autouse=True)(recipe.own_process)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipe.model_folder(tmp_path_factory.mktemp("ask") / "base")


@pytest.fixture
def adapter(base, tmp_path):
    return saved.adapter_folder(base, tmp_path / "adapter")


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    for number in range(9):
        name = f"more/{number}.png" if number % 2 else f"{number}.png"
        tiny.picture(40 + 9 * number, 50, seed=number).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def expected(folder: Path, question: str, images: list[Path], tokens: int = 6, earlier: tuple = ()) -> str:
    """The greedy answer, by generate() alone."""
    found = find_saved(str(folder))
    model, processor = open_model(found, torch.float32, False, torch.device("cpu")), read_processor(found)
    tags = "".join(f"<|image_{number + 1}|>\n" for number in range(len(images)))
    messages = [*earlier, {"role": "user", "content": tags + question}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(prompt, [tiny.Image.open(path).convert("RGB") for path in images] or None)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", ["base", "adapter"])
@pytest.mark.parametrize("order", ["question last", "question first"])
def test_a_question_is_answered_as_by_generate(kind, order, request, pictures, monkeypatch, capsys):
    folder, picture = request.getfixturevalue(kind), pictures / "0.png"
    flags = ["--image", picture, "--image", pictures / "2.png"]
    words = [folder, *flags, "What is it?"] if order == "question last" else [folder, "What is it?", *flags]
    saved.call(monkeypatch, ask, *words, "--max_new_tokens", "6")
    printed = capsys.readouterr()
    answer = expected(folder, "What is it?", [picture, pictures / "2.png"])
    assert answer
    assert printed.out.strip() == escape(answer)
    assert "tokens/s" in printed.err


def test_adapter_and_base_answer_differently(base, adapter, pictures):
    assert expected(base, "What is it?", [pictures / "0.png"]) != expected(adapter, "What is it?", [pictures / "0.png"])


def test_a_chat_knows_its_earlier_turns_and_pictures(base, pictures, monkeypatch, capsys):
    lines = [
        f"/image {pictures / '0.png'}",
        "What is it?",
        f"/image {pictures / '9.png'}",
        "/what",
        "And now?",
        "/new",
        "And now?",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    saved.call(monkeypatch, ask, base, "--max_new_tokens", "6")
    printed = capsys.readouterr()
    first = expected(base, "What is it?", [pictures / "0.png"])
    earlier = [
        {"role": "user", "content": "<|image_1|>\nWhat is it?"},
        {"role": "assistant", "content": first or "-"},
    ]
    found = find_saved(str(base))
    model, processor = open_model(found, torch.float32, False, torch.device("cpu")), read_processor(found)
    prompt = processor.apply_chat_template(
        [*earlier, {"role": "user", "content": "And now?"}], add_generation_prompt=True
    )
    inputs = processor(prompt, [tiny.Image.open(pictures / "0.png").convert("RGB")])
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    second = processor.tokenizer.decode(output, skip_special_tokens=True).strip()
    third = expected(base, "And now?", [])
    assert "9.png: expected an image file, found no such file" in printed.err
    answers = [
        line
        for line in printed.out.splitlines()
        if line.strip() and not line.startswith(("/image ", "/new ", "/quit "))
    ]
    assert [answer.strip() for answer in answers] == [escape(answer) for answer in (first, second, third) if answer]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pictures_of_a_folder_are_answered_one_by_one(adapter, pictures, monkeypatch, capsys):
    flags = ["--data", pictures, "--out", "answers.jsonl", "--max_new_tokens", "6", "--batch_size", "4"]
    saved.call(monkeypatch, ask, adapter, "What is it?", *flags)
    answers = read(Path("answers.jsonl"))
    assert [item["id"] for item in answers] == sorted(str(path) for path in pictures.rglob("*.png"))
    for item in answers:
        assert item["answer"] == expected(adapter, "What is it?", [Path(item["images"][0])])
    assert "9 answers (0 were there) -> answers.jsonl" in capsys.readouterr().out
    # the same command again asks nothing
    before = Path("answers.jsonl").read_bytes()
    saved.call(monkeypatch, ask, adapter, "What is it?", *flags)
    assert Path("answers.jsonl").read_bytes() == before
    assert "9 answers (9 were there)" in capsys.readouterr().out


def test_rows_hold_their_own_questions(base, pictures, monkeypatch):
    rows = [
        {"id": "a", "image": "0.png", "question": "One?"},
        {"images": ["2.png", "more/1.png"]},
        {"id": "c", "question": "No picture?"},
    ]
    recipe.write_jsonl(pictures / "rows.jsonl", rows)
    flags = ["--data", pictures / "rows.jsonl", "--out", "answers.jsonl", "--max_new_tokens", "6"]
    saved.call(monkeypatch, ask, base, "Both?", *flags)
    answers = read(Path("answers.jsonl"))
    assert [(item["id"], item["question"], len(item["images"])) for item in answers] == [
        ("a", "One?", 1),
        ("2", "Both?", 2),
        ("c", "No picture?", 0),
    ]
    assert answers[1]["answer"] == expected(base, "Both?", [pictures / "2.png", pictures / "more/1.png"])


def test_a_half_written_line_is_answered_again(base, pictures, monkeypatch):
    flags = ["--data", pictures, "--out", "answers.jsonl", "--max_new_tokens", "4"]
    saved.call(monkeypatch, ask, base, "What is it?", *flags)
    whole = Path("answers.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    Path("answers.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:30])
    saved.call(monkeypatch, ask, base, "What is it?", *flags)
    assert Path("answers.jsonl").read_bytes() == whole


def test_answers_of_another_model_or_settings_are_not_mixed(base, adapter, pictures, monkeypatch):
    flags = ["--data", pictures, "--out", "answers.jsonl", "--max_new_tokens", "4"]
    saved.call(monkeypatch, ask, base, "What is it?", *flags)
    before = Path("answers.jsonl").read_bytes()
    for other in (
        [adapter, "What is it?", *flags],
        [base, "What is it?", *flags[:-1], "5"],
        [base, "What?", *flags, "--num_crops", "1"],
    ):
        assert "found those of another in line 1" in saved.refusal(monkeypatch, ask, *other)
    assert Path("answers.jsonl").read_bytes() == before
    # another question of the same model is added
    saved.call(monkeypatch, ask, base, "What else?", *flags)
    assert len(read(Path("answers.jsonl"))) == 18


def test_a_damaged_picture_stops_or_is_skipped(base, pictures, monkeypatch, capsys):
    (pictures / "4.png").write_bytes(b"no picture")
    flags = [base, "What is it?", "--data", pictures, "--out", "answers.jsonl", "--max_new_tokens", "4"]
    assert "4.png" in saved.refusal(monkeypatch, ask, *flags)
    assert not Path("answers.jsonl").exists()
    saved.call(monkeypatch, ask, *flags, "--on_bad_row", "skip", "--max_bad_rows", "1")
    assert len(read(Path("answers.jsonl"))) == 8
    assert "8 answers (0 were there, 1 skipped)" in capsys.readouterr().out


def test_two_ranks_killed_and_started_again_answer_as_one(base, tmp_path):
    """Kills both ranks and their launcher once some answers are there; the same command then writes the rest."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(40):
        tiny.picture(60, 50, seed=number).save(folder / f"{number:02}.png")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(recipe.ROOT), "CUDA_VISIBLE_DEVICES": ""}
    for name in recipe.LAUNCHER:
        environment.pop(name, None)
    flags = [str(base), "What is it?", "--data", str(folder), "--batch_size", "2", "--max_new_tokens", "8", "--out"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

    def start(out: str, ranks: int):
        command = [*(launcher if ranks > 1 else [sys.executable]), "-m", "finetuning.ask", *flags, out]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, stdout=subprocess.PIPE)

    out = tmp_path / "answers.jsonl"
    first = start(str(out), 2)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n") >= 4) and time.monotonic() < deadline:
        time.sleep(0.05)
    # torchrun's workers have sessions of their own
    for process in (*children(first.pid), first.pid):
        os.kill(process, signal.SIGKILL)
    first.wait()
    done = out.read_bytes().count(b"\n")
    assert 4 <= done < 40
    kept = b"".join(out.read_bytes().splitlines(keepends=True)[:done])
    again = start(str(out), 2)
    text = again.communicate(timeout=200)[0].decode()
    assert again.returncode == 0
    assert f"40 answers ({done} were there)" in text
    assert out.read_bytes().startswith(kept)
    alone = start(str(tmp_path / "alone.jsonl"), 1)
    alone.communicate(timeout=200)
    answers = {path: [(item["id"], item["answer"]) for item in read(path)] for path in (out, tmp_path / "alone.jsonl")}
    assert len(answers[out]) == 40
    assert answers[out] == answers[tmp_path / "alone.jsonl"]


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found] + [below for child in found for below in children(int(child))]


def bad_calls(base: Path, adapter: Path, pictures: Path) -> dict[str, tuple[list, str]]:
    """Name -> call, and what its one line says."""
    empty, rows = pictures / "empty", pictures / "rows.jsonl"
    empty.mkdir()
    recipe.write_jsonl(rows, [{"image": "0.png"}])
    (pictures / "other.jsonl").write_text('{"a": 1}\n')
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name, change in {
        "moved": {"base_model_name_or_path": "gone"},
        "kind": {"peft_type": "IA3"},
        "code": {"megatron_config": {}},
    }.items():
        (pictures / name).mkdir()
        (pictures / name / "adapter_config.json").write_text(json.dumps({**config, **change}))
        (pictures / name / "adapter_model.safetensors").write_bytes(
            (adapter / "adapter_model.safetensors").read_bytes()
        )
    data = ["--data", pictures]
    return {
        "no such folder": ([pictures / "gone", "What?"], "no such folder; expected a folder or ORGANISATION/NAME"),
        "no model": ([empty, "What?"], "expected a model folder, found no config.json"),
        "no such picture": (
            [base, "What?", "--image", "gone.png"],
            "gone.png: expected an image file, found no such file",
        ),
        "no picture": ([base, "What?", "--image", pictures / "notes.txt"], "found another format or a damaged header"),
        "blank question": ([base, " "], "question: expected text"),
        "control token": ([base, "<|end|>"], "found the control token <|end|>"),
        "tag": ([base, "<|image_1|> what?"], "for 0 image(s): expected no image tag"),
        "unknown flag": ([base, "What?", "--imag", "a.png"], "--imag"),
        "crops": ([base, "What?", "--num_crops", "17"], "--num_crops 17: expected 1 to 16"),
        "tokens": ([base, "What?", "--max_new_tokens", "0"], "--max_new_tokens 0: expected 1 to 131072"),
        "too long": ([base, "What? " * 3000], "expected at most"),
        "data without out": ([base, "What?", *data], "--data: expected --out answers.jsonl beside it"),
        "out without data": ([base, "What?", "--out", "a.jsonl"], "--out: expected --data beside it"),
        "no pictures": (
            [base, "What?", "--data", empty, "--out", "a.jsonl"],
            "expected a folder or a pattern of pictures",
        ),
        "no question": ([base, *data, "--out", "a.jsonl"], "expected one for all; give it beside the folder"),
        "row without question": ([base, "--data", rows, "--out", "a.jsonl"], "rows.jsonl:1: it holds no question"),
        "out holds something else": (
            [base, "What?", *data, "--out", pictures / "other.jsonl"],
            "found something else in line 1",
        ),
        "out is a folder": ([base, "What?", *data, "--out", empty], "expected a file to write to"),
        "base moved": ([pictures / "moved", "What?"], "--base FOLDER says where the base model is now"),
        "other adapter": ([pictures / "kind", "What?"], "expected a LoRA adapter (peft_type LORA), found IA3"),
        "adapter with code": ([pictures / "code", "What?"], "expected no megatron_config"),
        "base of no adapter": ([base, "What?", "--base", base], "expected it left out"),
    }


def test_a_bad_call_gets_one_line(base, adapter, pictures, monkeypatch):
    for name, (argv, says) in bad_calls(base, adapter, pictures).items():
        assert says in saved.refusal(monkeypatch, ask, *argv), name


def test_a_moved_base_is_named(base, adapter, pictures, monkeypatch, capsys):
    bad_calls(base, adapter, pictures)
    saved.call(monkeypatch, ask, pictures / "moved", "What is it?", "--base", base, "--max_new_tokens", "6")
    assert capsys.readouterr().out.strip() == escape(expected(adapter, "What is it?", []))


def test_an_adapter_of_another_model_is_refused(adapter, tmp_path, monkeypatch):
    other = recipe.model_folder(tmp_path / "other", hidden_size=96, num_attention_heads=3, num_key_value_heads=3)
    assert "expected an adapter of" in saved.refusal(monkeypatch, ask, adapter, "What?", "--base", other)


def test_an_answer_does_nothing_to_the_terminal(capsys):
    streamer = ask.TerminalStreamer(tiny.TOKENIZER)
    streamer.on_finalized_text("red \x1b[31m and\nbell \a", stream_end=True)
    assert capsys.readouterr().out == "red \\x1b[31m and\nbell \\x07\n"
