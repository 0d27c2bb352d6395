"""Where a run begins: afresh, at its newest whole checkpoint, or finished; never in another run's folder, nothing lost."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import recipe
import torch
from safetensors.torch import save_file

from finetuning.arguments import RecipeArguments
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import BadRow, ConversationDataset
from finetuning.data.fingerprint import fingerprint
from finetuning.errors import InputError
from finetuning.training import resume
from finetuning.training.checkpoint import find_damage, read_manifest, seal
from finetuning.training.identity import read_run
from finetuning.training.resume import begin_or_resume

SCRIPT = "finetune_hf_trainer_docvqa.py"
LORA = ["--use_lora"]


@pytest.fixture(autouse=True)
def own_process(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"/somewhere/{SCRIPT}"])
    yield from recipe.own_process(tmp_path, monkeypatch)
    if resume._lock_file:
        resume._lock_file.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return recipe.model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "output"


def dataset(*answers: str, prompt="What?") -> ConversationDataset:
    """Rows r0, r1, ... with these answers, as `build_dataset` gives them."""
    known = [fingerprint(Conversation(f"r{n}", [Turn(prompt, [answer])])) for n, answer in enumerate(answers)]
    return ConversationDataset(list(answers), None, None, [9] * len(answers), fingerprints=known)


TRAIN, EVAL = dataset("a", "b", "c", "d"), dataset("a", "b")


class Start:
    """`start("--seed", "1")`: what `begin` settles for these flags: where the run begins, None for afresh."""

    def __init__(self, folder: Path):
        self.folder, self.finished = folder, None

    def __call__(self, *flags, train=TRAIN, answer=EVAL, strategy=LORA) -> str | None:
        args = recipe.arguments(self.folder, *strategy, *flags)
        self.finished = begin_or_resume(args, train, answer)
        found = args.resume_from_checkpoint
        return found and os.path.relpath(found)


@pytest.fixture
def start(folder) -> Start:
    return Start(folder)


def write_checkpoint(output: Path, step: int, layout: str = "LoRA", into: Path | None = None) -> Path:
    """checkpoint-N as the Trainer writes it, sealed; `layout` is LoRA or DeepSpeed."""
    folder = into or output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": [{"loss": 1.0}] * 20}))
    weights = {"a": torch.arange(300.0), "b": torch.full((50,), float(step))}
    if layout == "LoRA":
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
        save_file(weights, folder / "adapter_model.safetensors")
        torch.save({"state": {0: torch.arange(100.0) * step}}, folder / "optimizer.pt")
        torch.save({"last_epoch": step}, folder / "scheduler.pt")
    else:
        (folder / "config.json").write_text('{"model_type": "phi3_v"}')
        save_file({"a": weights["a"]}, folder / "model-00001-of-00002.safetensors")
        save_file({"b": weights["b"]}, folder / "model-00002-of-00002.safetensors")
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        states = folder / f"global_step{step}"
        states.mkdir()
        torch.save({"module": weights}, states / "mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": weights}, states / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
        (folder / "latest").write_text(f"global_step{step}")
        torch.save({"last_epoch": step}, folder / "scheduler.pt")
        (folder / "zero_to_fp32.py").write_text("# a script that DeepSpeed leaves\n")
    torch.save({"cpu": torch.arange(64, dtype=torch.uint8)}, folder / "rng_state.pth")
    torch.save({"lr": 0.1}, folder / "training_args.bin")
    (folder / "pending_loss_0.json").write_text('{"sum": 0.5, "logged_step": 1}')
    (folder / "tokenizer.json").write_text("{}")
    run = read_run(output) or {}
    if (output / "run.json").exists():
        shutil.copy(output / "run.json", folder / "run.json")
    seal(folder, {"step": step, "identity": run.get("identity")})
    return folder


def leave(output: Path, *steps: int, finished=False, layout="LoRA"):
    """What a run has left in its folder."""
    for step in steps:
        write_checkpoint(output, step, layout)
    items = [{"stage": stage, "id": "r0", "answer": "x"} for stage in ("before", "after")]
    recipe.write_jsonl(output / "predictions.jsonl", items)
    (output / "eval_before.json").write_text("{}")
    if finished:
        (output / "adapter_config.json").write_text("{}")
        save_file({"a": torch.ones(40)}, output / "adapter_model.safetensors")
        (output / "trainer_state.json").write_text('{"global_step": 9}')
        seal(output, {"step": 9, "identity": read_run(output)["identity"]}, sorted(output.glob("*a*p*_*")))
        (output / "eval_after.json").write_text("{}")
        (output / "report.html").write_text("")
    elif steps:
        (output / "eval_after.json").write_text("{}")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refusal(start: Start, *flags, **options) -> str:
    """The one line of a start that is refused, which changes nothing in the folder."""
    before = contents(Path("output"))
    with pytest.raises(InputError) as caught:
        start(*flags, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert contents(Path("output")) == before
    return message


def contents(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ---- nothing there yet


def test_a_new_folder_is_begun(start, output):
    assert start() is None
    assert start.finished is False
    record = read_run(output)
    assert record["script"] == SCRIPT
    assert record["settings"]["seed"] == 42
    assert record["spread"]["processes"] == 1
    assert set(record["rows"]) == {"train", "eval"}
    assert record["identity"]


@pytest.mark.parametrize(
    ("flags", "options", "named"),
    [
        (["--learning_rate", "1e-3"], {}, "learning_rate 0.001 instead of 4e-05"),
        ([], {"train": dataset("a", "b", "c", "X")}, "other answers in 1 of 4 rows to train on"),
    ],
)
def test_without_a_checkpoint_another_run_begins_and_says_so(start, output, flags, options, named, capsys):
    start()
    leave(output)
    first = read_run(output)["identity"]
    assert start(*flags, **options) is None
    said = capsys.readouterr().out
    assert "starting afresh" in said
    assert named in said
    assert read_run(output)["identity"] != first
    assert start(*flags, **options) is None
    assert "starting afresh" not in capsys.readouterr().out


def test_resuming_where_there_is_nothing_is_refused(start):
    assert "expected a whole checkpoint-N in output, found none" in refusal(start, "--resume_from_checkpoint")


def test_rows_that_were_left_out_are_listed(start, output):
    train = dataset("a")
    train.bad_rows = [BadRow("train", 3, "rows.jsonl:4", "rows.jsonl:4: no text, sondern 日本")]
    start(train=train)
    lines = (output / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"split": "train", "index": 3, "where": "rows.jsonl:4", "message": "rows.jsonl:4: no text, sondern 日本"}
    ]


# ---- the same run


@pytest.mark.parametrize("layout", ["LoRA", "DeepSpeed"])
@pytest.mark.parametrize("flags", [[], ["--resume_from_checkpoint"]], ids=["alone", "asked for"])
def test_the_same_command_goes_on_from_the_newest_checkpoint(start, output, layout, flags, capsys):
    strategy = LORA if layout == "LoRA" else []
    start(strategy=strategy)
    started = read_run(output)["started"]
    leave(output, 9, 10, 5, layout=layout)
    assert start(*flags, strategy=strategy) == "output/checkpoint-10"
    assert start.finished is False
    assert "going on from output/checkpoint-10" in capsys.readouterr().out
    assert read_run(output)["started"] == started
    # what was answered after training does not hold any more
    assert not (output / "eval_after.json").exists()
    assert (output / "eval_before.json").exists()
    assert (output / "predictions.jsonl").exists()


def test_a_finished_run_is_known(start, output, capsys):
    start()
    leave(output, 5, 10, finished=True)
    before = contents(output)
    assert start() == "output"
    assert start.finished is True
    after = contents(output)
    # only the record is written again, with the same content but for the time that it keeps
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} <= {"run_rows.parquet"}
    assert "going on" not in capsys.readouterr().out


def test_other_rows_to_answer_are_the_same_run(start, output):
    start()
    leave(output, 10, finished=True)
    assert start(answer=dataset("something", "else")) == "output"
    assert start.finished is True


@pytest.mark.parametrize("finished", [True, False])
def test_a_half_done_run_may_be_spread_otherwise_without_deepspeed(start, output, finished, monkeypatch, capsys):
    start()
    leave(output, 5, finished=finished)
    monkeypatch.setattr(RecipeArguments, "world_size", 2)
    monkeypatch.setattr(resume, "broadcast_object_list", lambda objects: objects)
    assert start("--batch_size_per_gpu", "4") == ("output" if finished else "output/checkpoint-5")
    said = capsys.readouterr().out
    assert "changed: processes 2 instead of 1" in said
    assert "changed: batch_size_per_gpu 4 instead of 1" in said


def test_deepspeed_goes_on_with_as_many_processes_only(start, output, monkeypatch):
    start(strategy=[])
    leave(output, 5, layout="DeepSpeed")
    monkeypatch.setattr(resume, "broadcast_object_list", lambda objects: objects)
    with monkeypatch.context() as patched:
        patched.setattr(RecipeArguments, "world_size", 2)
        message = refusal(start, strategy=[])
        assert "checkpoint-5: expected 1 processes" in message
        assert "found 2" in message
    # the micro-batch may change
    assert start("--batch_size_per_gpu", "4", strategy=[]) == "output/checkpoint-5"


def test_deepspeed_may_begin_again_or_end_on_other_processes(start, output, monkeypatch):
    monkeypatch.setattr(resume, "broadcast_object_list", lambda objects: objects)
    for layout, steps, finished in (("none left", [], False), ("finished", [5], True)):
        shutil.rmtree(output, ignore_errors=True)
        with monkeypatch.context() as patched:
            start(strategy=[])
            leave(output, *steps, finished=finished, layout="DeepSpeed")
            patched.setattr(RecipeArguments, "world_size", 2)
            assert start(strategy=[]) == ("output" if finished else None), layout


# ---- another run

OTHERS = {
    "a setting": (["--learning_rate", "1e-3"], {}, "learning_rate 0.001 instead of 4e-05"),
    "the effective batch": (["--batch_size", "8"], {}, "batch_size 8 instead of 16"),
    "what is trained": (["--freeze_vision_model"], {}, "freeze_vision_model true instead of false"),
    "the precision": (["--bf16"], {}, "bf16 true instead of false"),
    "a flag that nobody listed": (["--label_smoothing_factor", "0.1"], {}, "label_smoothing_factor 0.1 instead of 0.0"),
    "the strategy": ([], {"strategy": []}, "use_lora false instead of true"),
    "an answer": ([], {"train": dataset("a", "b", "X", "d")}, "other answers in 1 of 4 rows to train on (first 'r2': 'What? -> X' instead of 'What? -> c')"),
    "the prompt": ([], {"train": dataset("a", "b", "c", "d", prompt="Which?")}, "other prompts in 4 of 4 rows to train on (first 'r0': 'Which? -> a' instead of 'What? -> a')"),
    "a row more": ([], {"train": dataset("a", "b", "c", "d", "e")}, "1 more rows to train on (first 'r4')"),
    "a row less": ([], {"train": dataset("a", "b", "c")}, "1 rows to train on missing (first 'r3')"),
    "rows and a setting": (["--seed", "1"], {"train": dataset("a", "b", "c")}, "1 rows to train on missing (first 'r3'); seed 1 instead of 42"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "half-done"])
def test_another_run_is_refused_in_words(start, output, case, finished):
    flags, options, named = OTHERS[case]
    start()
    leave(output, 5, finished=finished)
    message = refusal(start, *flags, **options)
    kind = "finished" if finished else "half-done"
    assert message.startswith(f"--output_dir output holds a {kind} run of this script ({SCRIPT}) of ")
    assert named in message
    assert message.endswith("choose another --output_dir, or start afresh with --overwrite_output_dir")


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "half-done"])
def test_another_script_is_another_run(start, output, finished, monkeypatch):
    start()
    leave(output, 5, finished=finished)
    monkeypatch.setattr(sys, "argv", ["finetune_hf_trainer_nlvr2.py"])
    message = refusal(start)
    assert f"run of {SCRIPT} of " in message
    assert "with the same rows and settings, but by another script" in message
    # and with other rows those are what is said
    assert "other prompts in 4 of 4 rows" in refusal(start, train=dataset(*"abcd", prompt="Which?"))


def test_a_script_elsewhere_is_the_same(start, output, monkeypatch):
    start()
    leave(output, 5)
    monkeypatch.setattr(sys, "argv", [f"/moved/{SCRIPT}"])
    assert start() == "output/checkpoint-5"


def test_many_differences_are_counted(start, output):
    start()
    leave(output, 5)
    flags = [
        "--seed",
        "1",
        "--bf16",
        "--learning_rate",
        "1",
        "--weight_decay",
        "0",
        "--batch_size",
        "3",
        "--lora_rank",
        "2",
    ]
    message = refusal(start, *flags)
    assert "; 2 more differences;" in message
    assert message.count(" instead of ") == 4


def test_rows_whose_record_is_lost_are_other_rows_only_where_they_differ(start, output):
    start()
    leave(output, 5)
    (output / "run_rows.parquet").unlink()
    assert "with other rows to train on" in refusal(start, train=dataset("x"))
    assert start() == "output/checkpoint-5"


# ---- folders of something else


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "adapter_config.json", "tokenizer.json"])
def test_a_folder_with_a_model_is_not_written_to(start, output, name):
    output.mkdir()
    (output / name).write_text("mine")
    message = refusal(start)
    assert f"found {name} of something else" in message
    # nor does --overwrite_output_dir remove what no run wrote
    assert name in refusal(start, "--overwrite_output_dir")


def test_checkpoints_that_nobody_knows_are_refused(start, output):
    write_checkpoint(output, 5)
    assert "expected run.json beside checkpoint-5, found none" in refusal(start)


def test_other_files_in_the_folder_do_not_matter(start, output):
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert start() is None
    assert (output / "notes.txt").read_text() == "mine"


# ---- --overwrite_output_dir

WRITTEN = {
    "checkpoint-5", "checkpoint-10", "damaged-checkpoint-3", "run.json", "run_rows.parquet", "predictions.jsonl",
    "eval_before.json", "eval_after.json", "report.html", "adapter_config.json", "adapter_model.safetensors",
    "trainer_state.json", "manifest.json", "curves.png", "confusion.png", "bad_rows.jsonl", "runs", "README.md",
    "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "processor_config.json", "chat_template.jinja", "config.json", "generation_config.json", "training_args.bin",
    "run.json.part", "predictions.part",
}  # fmt: skip
MINE = {"notes.txt", "eval.ipynb", "my-data", "checkpoints.md", "predictions-old.jsonl", "link"}


def fill(output: Path):
    """All that a run may write, and files of the user's own."""
    leave(output, 5, 10, finished=True)
    (output / "damaged-checkpoint-3").mkdir()
    (output / "damaged-checkpoint-3" / "x").write_text("")
    (output / "runs").mkdir()
    for name in WRITTEN - names(output):
        (output / name).write_text("{}")
    (output / "my-data").mkdir()
    (output / "my-data" / "model.safetensors").write_text("mine")
    (output / "link").symlink_to(output.parent)
    for name in MINE - {"my-data", "link"}:
        (output / name).write_text("mine")


def test_overwriting_removes_all_that_a_run_wrote_and_nothing_else(start, output):
    start()
    fill(output)
    assert start("--overwrite_output_dir") is None
    assert names(output) == MINE | {".lock", "run.json", "run_rows.parquet"}
    assert (output / "my-data" / "model.safetensors").read_text() == "mine"
    assert (output / "notes.txt").read_text() == "mine"


def test_overwriting_follows_no_link(start, output, tmp_path):
    start()
    leave(output, 5)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (output / "runs").symlink_to(elsewhere)
    (output / "checkpoint-7").symlink_to(elsewhere)
    assert start("--overwrite_output_dir") is None
    assert (elsewhere / "precious").read_text() == "mine"
    assert not (output / "runs").exists()
    assert not (output / "checkpoint-7").exists()


def test_overwriting_takes_other_settings(start, output):
    start()
    leave(output, 5, finished=True)
    assert start("--seed", "1", "--overwrite_output_dir") is None
    assert read_run(output)["settings"]["seed"] == 1


def test_a_restart_by_torchrun_overwrites_nothing(start, output, monkeypatch):
    start("--overwrite_output_dir")
    leave(output, 5)
    before = contents(output)
    found = Start(start.folder)
    args = recipe.arguments(start.folder, *LORA, "--overwrite_output_dir")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    found.finished = begin_or_resume(args, TRAIN, EVAL)
    assert os.path.relpath(args.resume_from_checkpoint) == "output/checkpoint-5"
    checkpoint = {name for name in before if name.startswith("checkpoint-5/")}
    assert {name: contents(output)[name] for name in checkpoint} == {name: before[name] for name in checkpoint}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    args.resume_from_checkpoint = None
    begin_or_resume(args, TRAIN, EVAL)
    assert args.resume_from_checkpoint is None
    assert not (output / "checkpoint-5").exists()


# ---- a checkpoint that is named


def test_a_named_checkpoint_is_taken(start, output, capsys):
    start()
    leave(output, 5, 10, finished=True)
    assert start("--resume_from_checkpoint", "output/checkpoint-5") == "output/checkpoint-5"
    assert start.finished is False
    assert "going on from output/checkpoint-5" in capsys.readouterr().out
    # the run is not finished any more
    assert read_manifest(output) is None
    assert not {"report.html", "eval_after.json"} & names(output)


def test_a_named_checkpoint_may_stand_in_another_folder(start, output):
    start()
    leave(output, 5)
    assert start("--output_dir", "other", "--resume_from_checkpoint", "output/checkpoint-5") == "output/checkpoint-5"
    assert read_run(Path("other"))["identity"] == read_run(output)["identity"]


@pytest.mark.parametrize("case", OTHERS)
def test_a_named_checkpoint_of_another_run_is_refused(start, output, case):
    flags, options, named = OTHERS[case]
    start()
    leave(output, 5)
    message = refusal(start, "--resume_from_checkpoint", "output/checkpoint-5", *flags, **options)
    assert message.startswith("output/checkpoint-5 holds a half-done run")
    assert named in message


def test_a_named_folder_that_is_no_checkpoint_of_a_recipe_is_refused(start, tmp_path):
    start()
    (tmp_path / "checkpoint-1").mkdir()
    assert "found no run.json in it" in refusal(start, "--resume_from_checkpoint", "checkpoint-1")


def test_a_named_checkpoint_that_is_damaged_is_refused_and_stays(start, output):
    start()
    leave(output, 5, 10)
    (output / "checkpoint-10" / "scheduler.pt").unlink()
    message = refusal(start, "--resume_from_checkpoint", "output/checkpoint-10")
    assert message == "output/checkpoint-10: expected a whole checkpoint, but scheduler.pt is missing"


def test_checkpoints_of_weights_alone_are_left_where_they_are(start, output):
    start("--save_only_model")
    leave(output, 5)
    folder = output / "checkpoint-5"
    (folder / "optimizer.pt").unlink()
    seal(folder, {"step": 5, "identity": read_run(output)["identity"]})
    assert "--save_only_model" in refusal(start, "--save_only_model")
    assert folder.is_dir()


# ---- damaged checkpoints


def flip(path: Path, at: float = 0.5, bit: int = 0):
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(bytes(content))


def cut(path: Path, left: float):
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])


def move_out(path: Path):
    """The same content, but by a link to a file outside the checkpoint."""
    outside = path.parents[2] / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def change_manifest(folder: Path, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def entries(folder: Path, function):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    function(manifest["files"])
    path.write_text(json.dumps(manifest))


WEIGHTS = {"LoRA": "adapter_model.safetensors", "DeepSpeed": "model-00002-of-00002.safetensors"}
STATES = {"LoRA": "optimizer.pt", "DeepSpeed": "global_step4/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"}
KIND = {"LoRA": "adapter_config.json", "DeepSpeed": "model.safetensors.index.json"}
FILES = {"weights": WEIGHTS, "optimizer": STATES, "kind": KIND} | {
    name: {"LoRA": name, "DeepSpeed": name}
    for name in ("scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "pending_loss_0.json", "run.json")
}  # fmt: skip
WAYS = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: cut(path, 0.5),
    "without its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one bit": flip,
    "one bit of its first byte": lambda path: flip(path, 0, 7),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a link out": move_out,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
DAMAGE = {
    f"{name}, {way}": (lambda folder, layout, name=name, way=way: WAYS[way](folder / FILES[name][layout]))
    for name in FILES
    for way in WAYS
    if way in ("missing", "half", "one bit") or name in ("weights", "optimizer", "trainer_state.json")
} | {
    "no manifest": lambda folder, _: (folder / "manifest.json").unlink(),
    "an empty manifest": lambda folder, _: (folder / "manifest.json").write_text(""),
    "half a manifest": lambda folder, _: cut(folder / "manifest.json", 0.5),
    "a manifest without its last line": lambda folder, _: cut(folder / "manifest.json", 0.99),
    "a manifest that is a list": lambda folder, _: (folder / "manifest.json").write_text("[]"),
    "a manifest of another kind": lambda folder, _: (folder / "manifest.json").write_text('{"files": [], "step": 4}'),
    "a manifest without a step": lambda folder, _: change_manifest(folder, step=None),
    "a manifest of zeros": lambda folder, _: (folder / "manifest.json").write_bytes(bytes(500)),
    "a manifest that is not UTF-8": lambda folder, _: (folder / "manifest.json").write_bytes(b"\xff\xfe{}"),
    "a manifest under its first name": lambda folder, _: (folder / "manifest.json").rename(folder / "manifest.json.part"),
    "an entry of another kind": lambda folder, _: entries(folder, lambda files: files.update({"scheduler.pt": 7})),
    "an entry without a checksum": lambda folder, _: entries(folder, lambda files: files["scheduler.pt"].pop("xxh3_128")),
    "an entry outside": lambda folder, _: entries(folder, lambda files: files.update({"../run.json": {"size": 1, "xxh3_128": "0"}})),
    "an entry that is absolute": lambda folder, _: entries(folder, lambda files: files.update({"/etc/passwd": {"size": 1, "xxh3_128": "0"}})),
    "the files of another checkpoint": lambda folder, layout: shutil.copy(folder.parent / "checkpoint-2" / WEIGHTS["LoRA"], folder / "scheduler.pt") if layout == "LoRA" else shutil.copy(folder / "config.json", folder / "scheduler.pt"),
    "a state of step -1": lambda folder, _: (folder / "trainer_state.json").write_text(json.dumps({"global_step": -1})),
    "a state of step 10**9": lambda folder, _: (folder / "trainer_state.json").write_text((folder / "trainer_state.json").read_text().replace('"global_step": 4', '"global_step": 1000000000')),
    "all files empty": lambda folder, _: [path.write_bytes(b"") for path in folder.rglob("*") if path.is_file()],
    "nothing in it": lambda folder, _: (shutil.rmtree(folder), folder.mkdir()),
}  # fmt: skip


def test_there_are_enough_kinds_of_damage():
    assert len(DAMAGE) >= 30


@pytest.mark.parametrize("layout", ["LoRA", "DeepSpeed"])
@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_named_put_aside_and_the_one_before_is_taken(start, output, layout, case, capsys):
    strategy = LORA if layout == "LoRA" else []
    start(strategy=strategy)
    leave(output, 2, 4, layout=layout)
    DAMAGE[case](output / "checkpoint-4", layout)
    capsys.readouterr()
    assert start(strategy=strategy) == "output/checkpoint-2"
    line, going_on = capsys.readouterr().out.splitlines()
    assert line.startswith("skipped output/checkpoint-4: ")
    assert line.endswith("; it is now damaged-checkpoint-4")
    assert going_on == "going on from output/checkpoint-2"
    name = case.split(", ")[0]
    if name in FILES:
        assert Path(FILES[name][layout]).name in line
    # Out of the way of --save_total_limit, but not lost.
    assert {"checkpoint-2", "damaged-checkpoint-4"} <= names(output)
    assert "checkpoint-4" not in names(output)


@pytest.mark.parametrize("at", [number / 40 for number in range(41)])
def test_one_bit_of_any_place_of_the_manifest_is_noticed_or_changes_nothing(start, output, at):
    start()
    leave(output, 2, 4)
    whole = read_manifest(output / "checkpoint-4")
    flip(output / "checkpoint-4" / "manifest.json", at, 1)
    found = read_manifest(output / "checkpoint-4")
    damage = find_damage(output / "checkpoint-4")
    if damage is None:
        # the bit hit white space, or the step or identity (below)
        assert found["files"] == whole["files"]


FOREIGN = {
    "a manifest of another step": lambda folder: change_manifest(folder, step=2),
    "a manifest of step -1": lambda folder: change_manifest(folder, step=-1),
    "a manifest of step 10**9": lambda folder: change_manifest(folder, step=10**9),
    "a copy under another name": lambda folder: (shutil.rmtree(folder), shutil.copytree(folder.with_name("checkpoint-2"), folder)),
    "a checkpoint of another run": lambda folder: (
        (folder / "run.json").write_text((folder / "run.json").read_text().replace('"seed": 42', '"seed": 43')),
        seal(folder, {"step": 4, "identity": "0123456789abcdef"}),
    ),
    "a manifest of no file": lambda folder: change_manifest(folder, files={}),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_a_whole_checkpoint_of_another_step_or_run_is_noticed(start, output, case):
    start()
    leave(output, 2, 4)
    FOREIGN[case](output / "checkpoint-4")
    assert start() == "output/checkpoint-2"


def test_a_file_more_is_no_damage(start, output):
    start()
    leave(output, 2, 4)
    (output / "checkpoint-4" / "notes.txt").write_text("mine")
    assert start() == "output/checkpoint-4"


def test_an_optimizer_that_nobody_sealed_is_not_unpickled(start, output):
    start()
    leave(output, 4)
    torch.save({"state": Harmful()}, output / "checkpoint-4" / "more.pt")
    with pytest.raises(InputError, match=r"more.pt: expected tensors, found a pickle of .*print"):
        start()


class Harmful:
    """Pickled, it would print when it is loaded."""

    def __reduce__(self):
        return print, ("code of a checkpoint ran",)


def test_several_damaged_checkpoints_are_all_put_aside(start, output, capsys):
    start()
    leave(output, 2, 4, 6)
    (output / "checkpoint-6" / "scheduler.pt").unlink()
    flip(output / "checkpoint-4" / "adapter_model.safetensors")
    capsys.readouterr()
    assert start() == "output/checkpoint-2"
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[:2]] == ["skipped output/checkpoint-6", "skipped output/checkpoint-4"]


@pytest.mark.parametrize("flags", [[], ["--resume_from_checkpoint"]], ids=["alone", "asked for"])
def test_where_all_checkpoints_are_damaged_the_run_begins_again_unless_it_was_asked_to_resume(
    start, output, flags, capsys
):
    start()
    leave(output, 2)
    cut(output / "checkpoint-2" / "optimizer.pt", 0.9)
    if flags:
        with pytest.raises(InputError, match="expected a whole checkpoint-N in output, found none"):
            start(*flags)
        return
    assert start() is None
    assert "optimizer.pt is damaged" in capsys.readouterr().out
    assert not (output / "eval_after.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda output: cut(output / "adapter_model.safetensors", 0.5),
        lambda output: (output / "adapter_model.safetensors").write_bytes(b""),
        lambda output: flip(output / "adapter_model.safetensors"),
        lambda output: (output / "adapter_config.json").unlink(),
    ],
    ids=["half", "empty", "one bit", "missing"],
)
def test_final_weights_that_are_damaged_are_made_again_from_the_last_checkpoint(start, output, damage, capsys):
    start()
    leave(output, 5, 10, finished=True)
    damage(output)
    capsys.readouterr()
    assert start() == "output/checkpoint-10"
    assert start.finished is False
    assert "the final weights in output cannot be used: adapter_" in capsys.readouterr().out
    assert not {"manifest.json", "report.html", "eval_after.json"} & names(output)


def test_a_run_that_died_in_its_final_save_is_not_finished(start, output):
    start()
    leave(output, 10)
    save_file({"a": torch.ones(40)}, output / "adapter_model.safetensors")
    (output / "manifest.json.part").write_text("{")
    assert start() == "output/checkpoint-10"


def test_a_finished_run_without_checkpoints_is_finished(start, output):
    start()
    leave(output, finished=True)
    assert start() == "output"


# ---- one run a folder


def child(function) -> tuple[int, int]:
    """Forks a process that calls `function`, says so and waits for its end; its id, and a pipe that says when it is there."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        try:
            function()
            os.write(write, b"1")
            signal.pause()
        finally:
            os._exit(1)
    os.close(write)
    return process, read


def test_a_second_run_in_a_folder_is_refused_at_once_and_taken_when_the_first_was_killed(start, output):
    start()
    leave(output, 5)
    resume._lock_file.close()
    process, pipe = child(lambda: resume._lock(output))
    try:
        assert os.read(pipe, 1) == b"1"
        for flags in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "output/checkpoint-5"]):
            message = refusal(start, *flags)
            assert "expected no other run at work in it" in message
            assert f"process {process} on " in message
        # another folder is free
        assert start("--output_dir", "other") is None
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(pipe)
    assert start() == "output/checkpoint-5"


def test_the_lock_ends_with_the_run_though_its_workers_live_on(start, output):
    # A DataLoader worker is a fork of the run; with flock it would hold the lock as long as it lives.
    output.mkdir()
    read, write = os.pipe()

    def run_with_worker():
        resume._lock(output)
        worker = os.fork()
        if not worker:
            signal.pause()
            os._exit(0)
        os.write(write, worker.to_bytes(4, "big"))

    process, pipe = child(run_with_worker)
    worker = int.from_bytes(os.read(read, 4), "big")
    try:
        assert os.read(pipe, 1) == b"1"
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.kill(worker, 0)  # it lives
        assert start() is None
    finally:
        os.kill(worker, signal.SIGKILL)
        for descriptor in (read, write, pipe):
            os.close(descriptor)


def test_a_folder_that_cannot_be_locked_is_said_and_taken(start, monkeypatch, capsys):
    def fails(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(resume.fcntl, "lockf", fails)
    assert start() is None
    assert "warning: output cannot be locked (No locks available)" in capsys.readouterr().out


# ---- several ranks


def test_all_ranks_get_what_the_first_one_finds(start, output, monkeypatch):
    start()
    leave(output, 5)
    sent = []
    monkeypatch.setattr(RecipeArguments, "world_size", 2)
    monkeypatch.setattr(resume, "broadcast_object_list", lambda objects: sent.append(list(objects)) or objects)
    assert start() == "output/checkpoint-5"
    # The second rank sees none of it on its own disk.
    shutil.rmtree(output)
    monkeypatch.setattr(RecipeArguments, "process_index", 1)
    monkeypatch.setattr(resume, "broadcast_object_list", lambda _: sent.pop(0))
    monkeypatch.setattr(resume, "find_damage", lambda *_: None)
    other = ConversationDataset(list("abcd"), None, None, [9] * 4)
    assert start(train=other, answer=other) == "output/checkpoint-5"
    assert sent == []


def test_a_refusal_reaches_all_ranks(start, output, monkeypatch):
    start()
    leave(output, 5)
    sent = []
    monkeypatch.setattr(RecipeArguments, "world_size", 2)
    monkeypatch.setattr(resume, "broadcast_object_list", lambda objects: sent.append(list(objects)) or objects)
    message = refusal(start, "--seed", "1")
    monkeypatch.setattr(RecipeArguments, "process_index", 1)
    monkeypatch.setattr(resume, "broadcast_object_list", lambda _: sent.pop(0))
    with pytest.raises(InputError) as caught:
        start("--seed", "1")
    assert str(caught.value) == message


def test_a_folder_that_cannot_be_used_is_one_line(start, monkeypatch):
    def fails(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(resume, "_lock", fails)
    assert "--output_dir output: expected a folder to work in, found: [Errno 13] Permission denied" in refusal(start)
