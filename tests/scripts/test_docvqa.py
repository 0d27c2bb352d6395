"""The DocVQA script end to end, under torchrun on two processes: four strategies, resuming, splits of the batch, bad calls."""

import json
import math
import re
import shutil
import signal
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import recipe
import tiny
import torch
from launch import Run, python, record_bad_inputs, several, torchrun
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from finetuning.results.metrics import anls
from finetuning.training.lora import nf4
from phi3v import Phi3VForCausalLM

LAST_CLIP_LAYER = re.compile(r"vision_model\.(encoder\.layers\.2\.|post_layernorm)")  # tiny.py's tower has 3 layers
VISION = "model.vision_embed_tokens."
EPOCHS, TRAIN_ROWS, TEST_ROWS, BATCH = 2, 10, 5, 4
STEPS = EPOCHS * math.ceil(TRAIN_ROWS / BATCH)
STRATEGIES = {
    "full": [],
    "frozen": ["--freeze_vision_model"],
    # dropout: a resumed run must go on with the same random numbers
    "lora": ["--use_lora", "--lora_rank", "4", "--lora_dropout", "0.1"],
    "qlora": ["--use_qlora", "--lora_rank", "4"],
}
ADAPTERS = ("lora", "qlora")
SMALL_RUN = [
    *("--batch_size", str(BATCH), "--num_crops", "2", "--num_train_epochs", str(EPOCHS), "--learning_rate", "1e-3"),
    *("--warmup_steps", "0", "--logging_steps", "1", "--save_steps", "2", "--save_total_limit", "3"),
    *("--max_new_tokens", "8", "--dataloader_num_workers", "0", "--no-tqdm"),
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("docvqa")


@pytest.fixture(scope="session")
def base(folder) -> Path:
    # 128: bitsandbytes answers on a CPU only where both sides of a weight are multiples of its block, 64.
    return recipe.model_folder(folder / "model", intermediate_size=128)


@pytest.fixture(scope="session")
def data(folder) -> Path:
    return recipe.docvqa_rows(folder / "data", TRAIN_ROWS, TEST_ROWS)


@pytest.fixture(scope="session")
def flags(base, data) -> list[str]:
    return ["--model_name_or_path", str(base), "--data_dir", str(data), *SMALL_RUN]


@pytest.fixture(scope="session")
def trained(folder, flags):
    """`trained("full")`: the run of a strategy on two processes; full by torchrun, the others at the cost of one import."""
    others = {strategy: [*flags, *more] for strategy, more in STRATEGIES.items() if strategy != "full"}
    runs = {"full": torchrun(folder / "full", *flags), **several(others, folder, ranks=2)}
    for run in runs.values():
        assert run.status == 0, run.stdout + run.stderr
    return runs.__getitem__


def on_their_folders(calls: dict[str, list[str]], folder: Path) -> dict[str, Run]:
    """Runs on two processes, each with the --output_dir that its call ends with; what they said is kept in `folder`."""
    folder.mkdir()
    return {name: replace(run, output=Path(calls[name][-1])) for name, run in several(calls, folder, ranks=2).items()}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(
        path / ("model.safetensors" if (path / "model.safetensors").exists() else "adapter_model.safetensors")
    )


# ---- four strategies


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_run_writes_what_the_script_promises(trained, strategy):
    run = trained(strategy)
    found = {path.name for path in run.output.iterdir()}
    own = (
        {"adapter_config.json", "adapter_model.safetensors"}
        if strategy in ADAPTERS
        else {"config.json", "generation_config.json", "model.safetensors"}
    )
    expected = {"preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    expected |= {"eval_before.json", "eval_after.json", "predictions.jsonl", "curves.png", "report.html"}
    expected |= {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert own | expected <= found
    if strategy in ADAPTERS:
        assert not any(name.startswith("model") for name in found)
    assert not run.errors
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_run_says_what_it_trains(trained, strategy):
    text = trained(strategy).stdout
    assert re.search(r"^language model +[\d,]+ +[\d,]+  \w+", text, re.MULTILINE)
    assert "effective batch  4 = 2 rank(s) x 1 micro-batch x 2 accumulation" in text
    assert ("DeepSpeed" in text and "zero2.json" in text) == (strategy not in ADAPTERS)
    assert re.search(rf"^steps +{STEPS},", text, re.MULTILINE)
    # said by one rank only
    assert text.count("effective batch") == 1
    assert text.count("after training: anls") == 1


def test_a_run_on_the_cpu_compiles_nothing(trained):
    # On first use for minutes; killed meanwhile, it leaves a lock for which every later run waits in silence.
    assert "deepspeed_shm_comm" not in trained("full").stdout


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_loss_falls(trained, strategy):
    logs = trained(strategy).logs
    assert list(logs) == list(range(1, STEPS + 1))
    losses = trained(strategy).losses
    half = len(losses) // 2
    # epoch against epoch: the same rows
    assert sum(losses[half:]) < 0.95 * sum(losses[:half])
    assert all(entry["grad_norm"] > 0 for entry in logs.values())


@pytest.mark.parametrize("strategy", ["full", "frozen"])
def test_exactly_the_trained_parts_change(trained, base, strategy):
    before, after = weights(base), weights(trained(strategy).output)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kept = {
        name for name in before if LAST_CLIP_LAYER.search(name) or (strategy == "frozen" and name.startswith(VISION))
    }
    assert changed == set(before) - kept


@pytest.mark.parametrize("strategy", ADAPTERS)
def test_every_adapter_learns_and_nothing_else_is_saved(trained, base, strategy):
    adapter = weights(trained(strategy).output)
    assert all(".lora_" in name for name in adapter)
    # the matrices B begin as 0
    assert all(tensor.any() for name, tensor in adapter.items() if ".lora_B" in name)
    adapted = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in adapter}
    assert any(name.startswith(VISION) for name in adapted)
    assert {f"{name}.weight" for name in adapted} <= weights(base).keys()
    assert not any(LAST_CLIP_LAYER.search(f"{name}.") for name in adapted)


def reloaded(strategy: str, run: Run, base: Path):
    """The result as a user loads it, in three lines; QLoRA's base quantised as it was in training."""
    if strategy not in ADAPTERS:
        return Phi3VForCausalLM.from_pretrained(run.output)
    quantization = nf4(torch.float32) if strategy == "qlora" else None
    model = Phi3VForCausalLM.from_pretrained(base, quantization_config=quantization)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # As in the run: bitsandbytes' other kernel for CPUs rounds to bfloat16.
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(model, run.output)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_result_loads_again_and_gives_the_same_answers(trained, base, data, strategy):
    run = trained(strategy)
    model = reloaded(strategy, run, base).eval()
    processor = AutoProcessor.from_pretrained(run.output)
    assert processor.image_processor.num_crops == 2
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()][TRAIN_ROWS:]
    answers = []
    for row in rows:
        content = f"<|image_1|>\n{row['query']['en']}\nAnswer briefly."
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(prompt, Image.open(data / row["image"]))
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers.append(processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    result = run.evaluation("after")
    assert result["generated_texts_unique"] == [answer.strip() for answer in answers]
    assert result["ids"] == [row["id"] for row in rows]
    assert result["answers_unique"] == [row["answers"] for row in rows]
    scores = [anls(answer, row["answers"]) for answer, row in zip(answers, rows, strict=True)]
    assert result["anls"] == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_changes_the_answers(trained, strategy):
    run = trained(strategy)
    before, after = (run.evaluation(stage)["generated_texts_unique"] for stage in ("before", "after"))
    assert before != after
    stages = [json.loads(line)["stage"] for line in (run.output / "predictions.jsonl").read_text().splitlines()]
    assert stages == ["before"] * TEST_ROWS + ["after"] * TEST_ROWS


def test_all_strategies_begin_with_the_same_model(trained):
    texts = [trained(name).evaluation("before")["generated_texts_unique"] for name in ("full", "frozen", "lora")]
    assert texts[0] == texts[1] == texts[2]
    # quantised, it is another model from the start
    assert trained("qlora").losses[0] != trained("full").losses[0]
    assert trained("frozen").losses[0] == trained("full").losses[0]


# ---- resuming


@pytest.fixture(scope="session")
def resumed_runs(trained, folder, flags) -> dict[str, Run]:
    """Each strategy, begun in a folder as a run has left it that stopped after step 3, in the middle of an epoch."""
    calls = {}
    for strategy, more in STRATEGIES.items():
        output = folder / f"{strategy}-resumed"
        shutil.copytree(trained(strategy).output / "checkpoint-2", output / "checkpoint-2")
        for name in ("eval_before.json", "predictions.jsonl", "run.json", "run_rows.parquet"):
            shutil.copy(trained(strategy).output / name, output / name)
        calls[strategy] = [*flags, *more, "--output_dir", str(output)]
    return on_their_folders(calls, folder / "resumed")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(trained, resumed_runs, strategy):
    whole, resumed = trained(strategy), resumed_runs[strategy]
    output = resumed.output
    assert f"going on from {output / 'checkpoint-2'}" in resumed.stdout
    assert resumed.status == 0, resumed.stderr
    assert resumed.losses == whole.losses
    assert {step: entry["grad_norm"] for step, entry in resumed.logs.items()} == {
        step: entry["grad_norm"] for step, entry in whole.logs.items()
    }
    expected, found = weights(whole.output), weights(output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    # what was answered before training is still there, and was not answered again by another model
    assert resumed.evaluation("before") == whole.evaluation("before")
    assert resumed.evaluation("after")["generated_texts_unique"] == whole.evaluation("after")["generated_texts_unique"]
    assert "before training" not in resumed.stdout


def wait_for(path: Path, process) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.05)
    assert path.exists()


@pytest.fixture(scope="session")
def stopped(folder, flags) -> dict[str, tuple[Run, Run]]:
    """Runs that were stopped by SIGTERM, to torchrun or to one rank, and the same commands started again."""
    first = {}
    for name in ("torchrun", "one rank"):
        output = folder / f"{name.replace(' ', '-')}-told"

        def stop(process, output=output, name=name):
            wait_for(output / "checkpoint-2" / "manifest.json", process)
            told = process if name == "torchrun" else psutil.Process(process.pid).children()[1]
            told.send_signal(signal.SIGTERM)

        first[name] = torchrun(output, *flags, meanwhile=stop)
    calls = {name: [*flags, "--output_dir", str(run.output)] for name, run in first.items()}
    again = on_their_folders(calls, folder / "told")
    return {name: (run, again[name]) for name, run in first.items()}


def test_a_run_that_is_told_to_stop_loses_nothing(trained, stopped):
    whole, (first, again) = trained("full"), stopped["torchrun"]
    output = again.output
    assert first.status != 0
    assert first.stderr.count("stopped by SIGTERM") == 1
    # a machine that is fast enough is at its last steps, or answering, by then
    assert int(re.search(rf"going on from {output}/checkpoint-(\d)", again.stdout)[1]) > 2
    assert again.losses == whole.losses
    assert all(torch.equal(tensor, weights(output)[name]) for name, tensor in weights(whole.output).items())


def test_a_signal_to_one_rank_stops_all_of_them(trained, stopped):
    whole, (first, again) = trained("full"), stopped["one rank"]
    assert first.status != 0
    assert first.stderr.count("stopped by SIGTERM: checkpoint-") >= 1
    assert again.status == 0, again.stderr
    assert again.losses == whole.losses


def test_a_rank_that_dies_is_replaced(trained, folder, flags):
    whole, output = trained("lora"), folder / "rank-dies"

    def kill(process):
        wait_for(output / "checkpoint-2" / "manifest.json", process)
        psutil.Process(process.pid).children()[1].kill()

    run = torchrun(output, *flags, *STRATEGIES["lora"], options=["--max_restarts=1"], meanwhile=kill)
    assert run.status == 0, run.stderr
    assert f"going on from {output}/checkpoint-" in run.stdout
    assert run.losses == whole.losses
    assert all(torch.equal(tensor, weights(output)[name]) for name, tensor in weights(whole.output).items())


def test_a_finished_run_says_so(trained, folder, flags):
    run = trained("full")
    # the page and the card are made again, in case that the run died while they were written; run.json notes each start
    made_again = ("report.html", "curves.png", "confusion.png", "README.md", "run.json", ".lock")
    before = {path: path.stat().st_mtime_ns for path in run.output.rglob("*") if path.name not in made_again}
    again = on_their_folders({"full": [*flags, "--output_dir", str(run.output)]}, folder / "finished")["full"]
    assert again.status == 0, again.stderr
    assert "this run is finished" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path for path in run.output.rglob("*") if path.name not in made_again} == set(before)


@pytest.fixture(scope="session")
def diverging(folder, flags) -> dict[str, Run]:
    """After the first step every loss is nan; DeepSpeed's optimizer and the plain one."""
    (folder / "diverging").mkdir()
    calls = {
        f"{strategy}, {what}": [*flags, *STRATEGIES[strategy], "--learning_rate", "1e30", "--on_nonfinite", what]
        for strategy in ("full", "lora")
        for what in ("stop", "skip")
    }
    return several(calls, folder / "diverging")


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_a_loss_that_is_not_finite_names_step_and_samples(diverging, strategy):
    run = diverging[f"{strategy}, stop"]
    assert run.status == 1, run.stderr
    (line,) = run.errors
    assert re.search(r"step [23]: the (loss|gradient) of page-\d.* is not finite", line)
    assert "checkpoint" in line
    skipped = diverging[f"{strategy}, skip"]
    assert skipped.status == 0, skipped.stderr
    assert skipped.stdout.count("skipped: step") >= STEPS - 3
    assert all(tensor.isfinite().all() for tensor in weights(skipped.output).values())


# ---- calls of one process


@pytest.fixture(scope="session")
def alone(folder, flags) -> dict[str, Run]:
    """Runs on one process, by what is special about them."""
    home = folder / "alone"
    home.mkdir()
    zero2 = str(Path(__file__).parents[2] / "ds_configs" / "zero2.json")
    no_dropout = [*STRATEGIES["lora"], "--lora_dropout", "0"]
    calls = {
        "accumulation 4": [],
        "micro-batch 4": ["--batch_size_per_gpu", "4"],
        "micro-batch 2": ["--batch_size_per_gpu", "2"],
        "padding-free": ["--batch_size_per_gpu", "4", "--padding_free"],
        "eager": ["--attn_implementation", "eager"],
        "no recomputation": ["--recompute", "none"],
        "vision recomputed": ["--recompute", "vision"],
        "compiled": ["--padding_free", "--batch_size_per_gpu", "2", "--torch_compile_backend", "aot_eager"],
        "8-bit AdamW": ["--optim", "paged_adamw_8bit"],
        "lora": no_dropout,
        "lora under ZeRO-2": [*no_dropout, "--deepspeed", zero2],
        "lora, frozen vision": [*no_dropout, "--freeze_vision_model"],
        "qlora": STRATEGIES["qlora"],
        "full in bf16": ["--bf16"],
        "lora in bf16": [*no_dropout, "--bf16"],
        "qlora in bf16": [*STRATEGIES["qlora"], "--bf16"],
        "no evaluation": ["--eval_size", "0", "--max_steps", "1"],
        "two answers": ["--eval_size", "2", "--max_steps", "1", "--use_lora", "--lora_rank", "2"],
    }
    runs = several({name: [*flags, *more] for name, more in calls.items()}, home)
    for name, run in runs.items():
        assert run.status == 0, f"{name}: {run.stderr}"
    again = {}
    for name in ("accumulation 4", "lora", "qlora", "full in bf16"):
        output = home / f"{name} resumed"
        shutil.copytree(runs[name].output / "checkpoint-2", output / "checkpoint-2")
        for file in ("run.json", "run_rows.parquet"):
            shutil.copy(runs[name].output / file, output)
        again[f"{name}, resumed"] = [*flags, *calls[name], "--output_dir", str(output)]
    for name, run in several(again, home).items():
        assert run.status == 0, f"{name}: {run.stderr}"
        runs[name] = replace(run, output=Path(again[name][-1]))
    return runs


@pytest.mark.parametrize(
    "name",
    [
        "accumulation 4",
        "micro-batch 4",
        "micro-batch 2",
        "padding-free",
        "eager",
        "no recomputation",
        "vision recomputed",
        "compiled",
    ],
)
def test_losses_are_equal_however_the_batch_is_split(trained, alone, name):
    # against two processes with accumulation 2
    assert alone[name].losses == pytest.approx(trained("full").losses, abs=1e-5)


def test_8_bit_adamw_learns_under_zero2(alone):
    assert alone["8-bit AdamW"].losses == pytest.approx(alone["accumulation 4"].losses, rel=0.05)
    assert "DeepSpeed" in alone["8-bit AdamW"].stdout


@pytest.mark.parametrize("name", ["accumulation 4", "lora", "qlora", "full in bf16"])
def test_one_process_resumes_exactly(alone, name):
    whole, resumed = alone[name], alone[f"{name}, resumed"]
    assert "going on from" in resumed.stdout
    assert resumed.losses == whole.losses
    expected, found = weights(whole.output), weights(resumed.output)
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_lora_does_the_same_under_zero2(alone):
    assert alone["lora under ZeRO-2"].losses == pytest.approx(alone["lora"].losses, abs=1e-5)
    assert "DeepSpeed" in alone["lora under ZeRO-2"].stdout
    assert weights(alone["lora under ZeRO-2"].output).keys() == weights(alone["lora"].output).keys()


def test_qlora_does_the_same_on_one_process(trained, alone):
    assert alone["qlora"].losses == pytest.approx(trained("qlora").losses, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "reference"), [("full in bf16", "accumulation 4"), ("lora in bf16", "lora"), ("qlora in bf16", "qlora")]
)
def test_bfloat16_follows_float32(alone, name, reference):
    assert alone[name].losses == pytest.approx(alone[reference].losses, rel=0.1)
    dtypes = {tensor.dtype for tensor in weights(alone[name].output).values()}
    # the adapters' own weights stay in float32
    assert dtypes == {torch.bfloat16 if name.startswith("full") else torch.float32}


def test_frozen_vision_has_no_adapters_there(alone):
    names = weights(alone["lora, frozen vision"].output)
    assert names
    assert not any("vision_embed_tokens" in name for name in names)


def test_the_number_of_answers_can_be_limited(alone):
    assert alone["two answers"].evaluation("after")["num_answers"] == 2
    assert not (alone["no evaluation"].output / "eval_after.json").exists()
    assert (alone["no evaluation"].output / "report.html").exists()


# ---- bad calls


def edited(data: Path, folder: Path, line: int, **changes) -> Path:
    """A copy of the data in which one row has other fields; None leaves a field out."""
    lines = (data / "rows.jsonl").read_text().splitlines()
    row = {**json.loads(lines[line]), **changes}
    lines[line] = json.dumps({name: value for name, value in row.items() if value is not None})
    return with_lines(data, folder, lines)


def with_lines(data: Path, folder: Path, lines: list[str]) -> Path:
    shutil.copytree(data / "images", folder / "images")
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels that is some hundred bytes long."""
    chunk = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    parts = [(b"IHDR", chunk), (b"IDAT", zlib.compress(b"\0" * 3_751)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts
    )


def model_folders(base: Path, home: Path) -> dict[str, Path]:
    """Copies of a model folder, each with a fault."""
    names = (
        "other shape",
        "cut weights",
        "missing shard",
        "pickle",
        "other model",
        "broken config",
        "broken tokenizer",
    )
    found = {name: shutil.copytree(base, home / name.replace(" ", "-")) for name in names}
    config = json.loads((base / "config.json").read_text())
    (found["other shape"] / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    content = (base / "model.safetensors").read_bytes()
    (found["cut weights"] / "model.safetensors").write_bytes(content[: len(content) // 2])
    (found["missing shard"] / "model.safetensors").unlink()
    Phi3VForCausalLM.from_pretrained(base).save_pretrained(found["missing shard"], max_shard_size="300KB")
    sorted(found["missing shard"].glob("model-*.safetensors"))[1].unlink()
    torch.save(load_file(base / "model.safetensors"), found["pickle"] / "pytorch_model.bin")
    (found["pickle"] / "model.safetensors").unlink()
    (found["other model"] / "config.json").write_text('{"model_type": "llama"}')
    (found["broken config"] / "config.json").write_text("{")
    (found["broken tokenizer"] / "tokenizer.json").write_text("{")
    return found


@pytest.fixture(scope="session")
def bad(folder, base, data, request) -> dict[str, Run]:
    """Bad calls, with a model that has no weights: what is refused must be refused before it is loaded."""
    home = folder / "bad"
    home.mkdir()
    hollow = shutil.copytree(base, home / "hollow", ignore=shutil.ignore_patterns("*.safetensors"))
    lines = (data / "rows.jsonl").read_text().splitlines()
    broken = with_lines(data, home / "broken", [*lines[:2], lines[2][:-5], *lines[3:]])
    unreadable = edited(data, home / "unreadable", 3, image="images/notes.png")
    (unreadable / "images" / "notes.png").write_text("no image")
    regular_file = home / "file"
    regular_file.write_text("")
    rows = {
        "missing image": edited(data, home / "missing", 4, image="images/gone.png"),
        "missing image to answer": edited(data, home / "missing-test", 11, image="images/gone.png"),
        "unreadable image": unreadable,
        "image outside the folder": edited(data, home / "outside", 4, image="../model/config.json"),
        "tag without image": edited(data, home / "tag", 4, query={"en": "Is it <|image_2|>?"}),
        "control token": edited(data, home / "control", 4, query={"en": "Is it?<|end|>"}),
        "no answers field": edited(data, home / "no-answers", 4, answers=None),
        "empty answers": edited(data, home / "no-answers-data", 4, answers=[]),
        "answers as one text": edited(data, home / "text-answers", 4, answers="4711"),
        "no question": edited(data, home / "no-query", 4, query=None),
        "question as text": edited(data, home / "text-query", 4, query="What?"),
        "no image field": edited(data, home / "no-image", 4, image=None),
        "no id": edited(data, home / "no-id-data", 4, id=None, image="images/gone.png"),
        "no test rows": with_lines(data, home / "no-test", lines[:TRAIN_ROWS]),
        "broken line": broken,
    }
    for name, content in (("bomb.png", bomb()), ("empty.png", b""), ("text.png", b"no image")):
        folder = edited(data, home / name, 4, image=f"images/{name}")
        (folder / "images" / name).write_bytes(content)
        rows[f"image: {name}"] = folder
    for name, line in (
        ("a list", b"[1]"),
        ("a byte order mark", b"\xef\xbb\xbf{}"),
        ("Latin-1", b'{"a": "\xff"}'),
        ("deep nesting", b"[" * 100_000),
        ("digits", b'{"a": ' + b"1" * 5_000 + b"}"),
    ):
        folder = with_lines(data, home / name, lines)
        (folder / "rows.jsonl").write_bytes(line + b"\n" + (folder / "rows.jsonl").read_bytes())
        rows[f"line: {name}"] = folder
    models = model_folders(base, home / "models")
    # A file that ends early is met when it is read, after the model was loaded; also by a worker process.
    cut = edited(data, home / "cut", 4, image="images/cut.jpg")
    tiny.picture(300, 200).save(cut / "images" / "cut.jpg")
    content = (cut / "images" / "cut.jpg").read_bytes()
    (cut / "images" / "cut.jpg").write_bytes(content[: len(content) // 2])
    training = ["--model_name_or_path", str(base), "--data_dir", str(cut), "--use_lora", "--eval_size", "0"]
    good = ["--data_dir", str(data)]
    (home / "no-checkpoint" / "checkpoint-2").mkdir(parents=True)
    shutil.copytree(base, home / "full-checkpoint" / "checkpoint-2")
    (home / "full-checkpoint" / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2}')
    torch.save({}, home / "full-checkpoint" / "checkpoint-2" / "optimizer.pt")
    calls = {
        **{name: ["--data_dir", str(path)] for name, path in rows.items()},
        **{f"model: {name}": [*good, "--model_name_or_path", str(path)] for name, path in models.items()},
        "learning rate below 0": [*good, "--learning_rate", "-1"],
        "unknown tracker": [*good, "--report_to", "nonsense"],
        "a checkpoint and afresh": [*good, "--resume_from_checkpoint", "--overwrite_output_dir"],
        "bf16 and fp16": [*good, "--bf16", "--fp16"],
        "flash attention on the CPU": [*good, "--use_flash_attention"],
        "data folder and full train": [*good, "--full_train"],
        "missing data folder": ["--data_dir", str(home / "nowhere")],
        "too long": [*good, "--max_length", "30"],
        "num_crops 17": [*good, "--num_crops", "17"],
        "accumulation that does not fit": [*good, "--batch_size", "8", "--gradient_accumulation_steps", "3"],
        "output below a file": [*good, "--output_dir", str(regular_file / "out")],
        "nothing to resume": [*good, "--resume_from_checkpoint"],
        "resume from an unfinished checkpoint": [
            *good,
            "--resume_from_checkpoint",
            str(home / "no-checkpoint" / "checkpoint-2"),
        ],
        "resume LoRA from a full checkpoint": [
            *good,
            "--use_lora",
            "--resume_from_checkpoint",
            str(home / "full-checkpoint" / "checkpoint-2"),
        ],
        "unknown flag": [*good, "--use_lorra"],
        "wrong model": [*good, "--model_name_or_path", str(data)],
        "no weights": good,
        "truncated image": training,
        "truncated image, read by a worker": [*training, "--dataloader_num_workers", "1"],
    }  # fmt: skip
    runs = several(
        {name: ["--model_name_or_path", str(hollow), *SMALL_RUN, *more] for name, more in calls.items()}, home
    )
    if path := request.config.getoption("--bad-inputs"):
        record_bad_inputs(Path(path), runs, str(home.parent))
    return runs


BAD = {
    "missing image": ["page-4", "gone.png"],
    "missing image to answer": ["page-11", "gone.png"],
    "unreadable image": ["page-3", "notes.png"],
    "image outside the folder": ["rows.jsonl:5", "config.json"],
    "tag without image": ["page-4", "<|image_2|>"],
    "control token": ["page-4", "<|end|>"],
    "no answers field": ["page-4", "answers"],
    "empty answers": ["page-4", "answers: expected a list with at least 1"],
    "answers as one text": ["page-4", "4711"],
    "no question": ["page-4", "query"],
    "question as text": ["page-4"],
    "no image field": ["page-4", "image"],
    "no id": ["rows.jsonl:5", "id"],
    "no test rows": ["rows.jsonl", '"split": "test'],
    "broken line": ["rows.jsonl:3"],
    "image: bomb.png": ["page-4", "bomb.png", "--max_image_pixels", "900000000"],
    "image: empty.png": ["page-4", "empty.png"],
    "image: text.png": ["page-4", "text.png"],
    "line: a list": ["rows.jsonl:1", "list"],
    "line: a byte order mark": ["rows.jsonl:1", "BOM"],
    "line: Latin-1": ["rows.jsonl", "UTF-8"],
    "line: deep nesting": ["rows.jsonl:1"],
    "line: digits": ["rows.jsonl:1", "digits"],
    "model: other shape": ["other-shape", "expected shape"],
    "model: cut weights": ["cut-weights"],
    "model: missing shard": ["missing-shard", "model-00002"],
    "model: pickle": ["pickle", "safetensors"],
    "model: other model": ["other-model", "llama"],
    "model: broken config": ["broken-config", "config.json"],
    "model: broken tokenizer": ["broken-tokenizer", "tokenizer.json"],
    "learning rate below 0": ["--learning_rate -1"],
    "unknown tracker": ["--report_to nonsense"],
    "a checkpoint and afresh": ["--overwrite_output_dir"],
    "bf16 and fp16": ["--bf16", "--fp16"],
    "flash attention on the CPU": ["CPU", "sdpa"],
    "data folder and full train": ["--full_train", "--data_dir"],
    "missing data folder": ["nowhere"],
    "too long": ["page-0", "30", "--max_length"],
    "num_crops 17": ["--num_crops 17", "1 to 16"],
    "accumulation that does not fit": ["--gradient_accumulation_steps 3", "makes it 8"],
    "output below a file": ["--output_dir", "Not a directory"],
    "nothing to resume": ["checkpoint-N"],
    "resume from an unfinished checkpoint": ["checkpoint-2"],
    "resume LoRA from a full checkpoint": ["checkpoint-2", "run.json"],
    "unknown flag": ["--use_lorra"],
    "wrong model": ["config.json"],
    "no weights": ["weights", "hollow"],
    "truncated image": ["page-4", "cut.jpg"],
    "truncated image, read by a worker": ["page-4", "cut.jpg"],
}


WEIGHTS = ("no weights", "model: cut weights", "model: pickle")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_ends_with_one_line_before_the_model_is_loaded(bad, name):
    run = bad[name]
    assert run.status == 2, run.stderr
    (line,) = run.errors
    for part in BAD[name]:
        assert part in line
    assert "Traceback" not in run.stderr
    # had it come so far, it would have missed the weights
    assert ("expected weights" in line) == (name in WEIGHTS)


def test_every_bad_call_is_checked(bad):
    assert bad.keys() == BAD.keys()


def test_a_bad_call_by_plain_python(folder, base, data):
    run = python(folder / "python", "--model_name_or_path", str(base), "--data_dir", str(data), "--num_crops", "0")
    assert run.status == 2
    assert run.errors == ["error: --num_crops 0: expected a whole number from 1 to 16"]
    assert run.stdout == ""
    assert not run.output.exists()


def test_two_processes_say_it_once(folder, base, data):
    missing = edited(data, folder / "missing-under-torchrun", 5, image="images/gone.png")
    run = torchrun(folder / "said-once", "--model_name_or_path", str(base), "--data_dir", str(missing), *SMALL_RUN)
    assert run.status != 0
    (line,) = run.errors
    assert "page-5" in line
    # torchrun shows the same line, not the frames it came through
    assert run.stderr.count(line) > 1
    assert "build_dataset" not in run.stderr
    assert "Writing" not in run.stdout
