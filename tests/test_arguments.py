"""Flags: published names and defaults, what is derived from them, and one line for each that cannot be."""

import dataclasses
import importlib.util
import json
import os
import re
import resource
import sys
from pathlib import Path

import pytest
import recipe
import torch
from transformers import TrainingArguments

from finetuning.arguments import GROUPS, RANGES, ZERO2, RecipeArguments, default_output_dir, parse_args
from finetuning.errors import InputError

SCRIPT = "finetune_hf_trainer_docvqa.py"


@pytest.fixture(autouse=True)
def own_process(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"/somewhere/{SCRIPT}"])
    yield from recipe.own_process(tmp_path, monkeypatch)


# DESIGN.md, 'Behaviour that users rely on': flag, field, published default, another value.
PUBLISHED = [
    ("--model_name_or_path", "model_name_or_path", "microsoft/Phi-3.5-vision-instruct", "microsoft/another"),
    ("--use_flash_attention", "use_flash_attention", False, None),
    ("--bf16", "bf16", False, True),
    ("--use_lora", "use_lora", False, True),
    ("--use_qlora", "use_qlora", False, True),
    ("--freeze_vision_model", "freeze_vision_model", False, True),
    ("--output_dir", "output_dir", "output/docvqa", "elsewhere"),
    ("--batch_size", "batch_size", 16, 64),
    ("--batch_size_per_gpu", "per_device_train_batch_size", 1, 2),
    ("--num_crops", "num_crops", 16, 4),
    ("--num_train_epochs", "num_train_epochs", 1, 2),
    ("--learning_rate", "learning_rate", 4e-5, 1e-4),
    ("--wd", "weight_decay", 0.01, 0.1),
    ("--no-tqdm", "disable_tqdm", False, True),
    ("--lora_rank", "lora_rank", 64, 8),
    ("--lora_alpha_ratio", "lora_alpha_ratio", 2, 0.5),
    ("--lora_dropout", "lora_dropout", 0, 0.1),
    ("--full_train", "full_train", False, True),
    ("--data_dir", "data_dir", None, str(Path(__file__).parent)),
    # optimizer: AdamW, betas 0.9/0.95, eps 1e-7, linear schedule, 50 warm-up steps, clip 1.0
    ("--adam_beta1", "adam_beta1", 0.9, 0.8),
    ("--adam_beta2", "adam_beta2", 0.95, 0.999),
    ("--adam_epsilon", "adam_epsilon", 1e-7, 1e-8),
    ("--lr_scheduler_type", "lr_scheduler_type", "linear", "cosine"),
    ("--warmup_steps", "warmup_steps", 50, 5),
    ("--max_grad_norm", "max_grad_norm", 1.0, 0.5),
    # Trainer's own flags, which must pass through
    ("--max_steps", "max_steps", -1, 7),
    ("--seed", "seed", 42, 1),
    ("--report_to", "report_to", [], None),
    ("--save_strategy", "save_strategy", "steps", "no"),
]


@pytest.fixture
def without_trainer(monkeypatch):
    """Only the recipe's own part: the Trainer's would wait for the other ranks, and ask a GPU that is not there."""
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda _: None)


@pytest.fixture
def gpu(monkeypatch, request):
    """Makes torch report one GPU: `gpu(8, "A100")`, compute capability and name."""
    request.getfixturevalue("without_trainer")

    def set_up(capability: int, name: str):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (capability, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capability >= 8)

    return set_up


@pytest.fixture
def installed(monkeypatch):
    """`installed("flash_attn")` or `installed("flash_attn", False)`: what find_spec says of a package."""
    found = {}
    find_spec = importlib.util.find_spec

    def answer(name, package=None):
        return (object() if found[name] else None) if name in found else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", answer)
    return lambda name, value=True: found.update({name: value})


def call(value) -> str:
    """Test ids: the flags as they would be typed."""
    return " ".join(value) if isinstance(value, list) else value


def refusal(*flags: str) -> str:
    """The message of a refused call: one line."""
    with pytest.raises(InputError) as caught:
        parse_args(list(flags))
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


def test_published_defaults():
    args = parse_args([])
    assert {flag: getattr(args, field) for flag, field, _, _ in PUBLISHED} == {
        flag: default for flag, _, default, _ in PUBLISHED
    }
    assert "adamw" in args.optim


@pytest.mark.parametrize(
    ("flag", "field", "value"), [(flag, field, value) for flag, field, _, value in PUBLISHED if value is not None]
)
def test_published_flags_are_taken(flag, field, value):
    if value is True:
        assert getattr(parse_args([flag]), field) is True
        return
    text = value[0] if isinstance(value, list) else str(value)
    assert getattr(parse_args([flag, text]), field) == value


@pytest.mark.parametrize("flag", ["--no-tqdm", "--no_tqdm", "--disable_tqdm", "--disable-tqdm"])
def test_progress_bars_can_be_switched_off_by_any_name(flag):
    assert parse_args([flag]).disable_tqdm is True


@pytest.mark.parametrize("flag", ["--wd", "--weight_decay", "--weight-decay"])
def test_names_of_weight_decay(flag):
    assert parse_args([flag, "0.25"]).weight_decay == 0.25


@pytest.mark.parametrize(
    "flag",
    [
        "--batch_size_per_gpu",
        "--per_device_train_batch_size",
        "--per-device-train-batch-size",
        "--batch-size-per-gpu",
    ],
)
def test_names_of_the_micro_batch(flag):
    assert parse_args([flag, "4"]).per_device_train_batch_size == 4


def test_dashes_stand_for_underscores():
    args = parse_args(["--num-crops", "4", "--use-lora", "--lora-rank", "8", "--output-dir", "there"])
    assert (args.num_crops, args.use_lora, args.lora_rank, args.output_dir) == (4, True, 8, "there")


def test_a_task_has_its_own_defaults():
    assert parse_args([], num_crops=4).num_crops == 4
    assert parse_args(["--num_crops", "2"], num_crops=4).num_crops == 2


@pytest.mark.parametrize("flag", ["--bf16", "--use_lora", "--padding_free"])
def test_a_switch_takes_false(flag):
    assert getattr(parse_args([flag, "False"]), flag[2:]) is False


@pytest.mark.usefixtures("without_trainer")
@pytest.mark.parametrize(
    ("ranks", "micro_batch", "batch", "steps"),
    [
        *((1, 1, 16, 16), (2, 1, 16, 8), (8, 1, 16, 2), (8, 2, 16, 1), (2, 4, 64, 8), (1, 64, 64, 1)),
        # what does not divide is rounded up: places stay empty
        *((3, 1, 16, 6), (8, 4, 16, 1), (1, 3, 16, 6), (2, 1, 1, 1), (1, 32, 16, 1)),
    ],
)
def test_accumulation_is_derived(ranks, micro_batch, batch, steps, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    args = parse_args(["--batch_size", str(batch), "--batch_size_per_gpu", str(micro_batch), "--no-tqdm"])
    assert args.gradient_accumulation_steps == steps


def test_accumulation_may_be_given_if_it_agrees():
    assert parse_args(["--gradient_accumulation_steps", "16"]).gradient_accumulation_steps == 16
    message = refusal("--gradient_accumulation_steps", "3")
    assert "3" in message
    assert "makes it 16" in message


@pytest.mark.usefixtures("without_trainer")
@pytest.mark.parametrize(
    ("ranks", "cores", "workers"), [(1, 16, 4), (1, 3, 2), (2, 4, 1), (1, 1, 0), (2, 2, 0), (4, 2, 0)]
)
def test_workers_fit_the_cores(ranks, cores, workers, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert parse_args(["--no-tqdm"]).dataloader_num_workers == workers


@pytest.mark.parametrize(
    ("flags", "name", "config"),
    [
        ([], "full", str(ZERO2)),
        (["--freeze_vision_model"], "full with frozen vision", str(ZERO2)),
        (["--use_lora"], "LoRA", None),
        (["--use_qlora"], "QLoRA", None),
        (["--use_lora", "--freeze_vision_model"], "LoRA with frozen vision", None),
        (["--use_lora", "--deepspeed", str(ZERO2)], "LoRA", str(ZERO2)),
        (["--deepspeed", "zero2"], "full", str(ZERO2)),
        (["--use_lora", "--deepspeed", "zero2"], "LoRA", str(ZERO2)),
        (["--deepspeed", "none"], "full", None),
        (["--deepspeed", "None"], "full", None),
        (["--use_lora", "--deepspeed", "none"], "LoRA", None),
    ],
)
def test_zero2_is_the_default_of_full_and_frozen_only(flags, name, config):
    args = parse_args(flags)
    assert (args.strategy, args.deepspeed) == (name, config)
    assert args.deepspeed_config == (json.loads(ZERO2.read_text()) if config else None)


@pytest.mark.parametrize("spaces", ["", "  "])
def test_deepspeed_may_be_given_inline(spaces):
    config = json.loads(ZERO2.read_text()) | {"zero_optimization": {"stage": 1}}
    args = parse_args(["--deepspeed", spaces + json.dumps(config)])
    assert args.deepspeed_config == args.deepspeed == config
    assert args.hf_deepspeed_config.config["zero_optimization"] == {"stage": 1}


BAD_DEEPSPEED = {
    "no file": (
        "nowhere.json",
        "expected zero2, zero2_offload, zero3, zero3_offload, a file, inline JSON or none, found",
    ),
    "a folder": (".", "found no such file"),
    "nothing": ("", "found no such file"),
    "torn JSON": ("{", "expected JSON, found"),
    "inline JSON with single quotes": ("{'stage': 2}", "expected JSON, found"),
    "a file of something else": ("notes.txt", "expected JSON, found"),
    "a list in a file": ("list.json", "expected a JSON object, found list"),
    "nested too deep": ("deep.json", "expected JSON, found"),
    "another micro-batch": (
        '{"train_micro_batch_size_per_gpu": 3}',
        'train_micro_batch_size_per_gpu: expected "auto" or 1',
    ),
    "another accumulation": (
        '{"gradient_accumulation_steps": 3}',
        'gradient_accumulation_steps: expected "auto" or 16',
    ),
    "a text as accumulation": ('{"gradient_accumulation_steps": "x"}', 'expected "auto" or 16'),
}


@pytest.mark.parametrize("case", BAD_DEEPSPEED)
def test_bad_deepspeed_is_one_line(case):
    Path("notes.txt").write_text("stage 2")
    Path("list.json").write_text("[]")
    Path("deep.json").write_text("[" * 100_000)
    given, named = BAD_DEEPSPEED[case]
    message = refusal("--deepspeed", given)
    assert message.startswith(f"--deepspeed {given}")
    assert named in message


def test_deepspeed_that_agrees_is_taken():
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 16,
        "zero_optimization": {"stage": 0},
    }
    assert parse_args(["--deepspeed", json.dumps(config)]).deepspeed_config == config


def test_qlora_implies_lora():
    assert parse_args(["--use_qlora"]).use_lora is True


def test_qlora_without_bitsandbytes_is_refused(installed):
    installed("bitsandbytes", False)
    message = refusal("--use_qlora")
    assert "bitsandbytes" in message
    assert "--use_lora" in message
    assert parse_args(["--use_lora"]).use_lora


# ---- devices


def test_the_cpu_trains_in_float32_or_bfloat16():
    args = parse_args([])
    assert (args.use_cpu, args.fp16, args.compute_dtype) == (True, False, torch.float32)
    assert parse_args(["--bf16"]).compute_dtype == torch.bfloat16
    assert "--fp16" in refusal("--fp16")


@pytest.mark.parametrize(
    "flags", [["--use_flash_attention", "--bf16"], ["--attn_implementation", "flash_attention_2", "--bf16"]]
)
def test_flash_attention_on_the_cpu_is_refused(flags, installed):
    installed("flash_attn")
    message = refusal(*flags)
    assert "CPU" in message
    assert "sdpa" in message


def test_a_gpu_trains_in_float16_unless_told_otherwise(gpu):
    gpu(7, "Tesla V100")
    assert parse_args(["--no-tqdm"]).compute_dtype == torch.float16
    assert parse_args(["--no-tqdm", "--fp16", "False"]).compute_dtype == torch.float32
    gpu(8, "A100")
    assert parse_args(["--no-tqdm"]).compute_dtype == torch.float16
    assert parse_args(["--no-tqdm", "--bf16"]).compute_dtype == torch.bfloat16


def test_bf16_on_a_gpu_without_it_is_refused(gpu):
    gpu(7, "Tesla V100")
    message = refusal("--bf16")
    assert "Tesla V100" in message
    assert "Ampere" in message


@pytest.mark.parametrize("dtype", ["--fp16", "--bf16"])
def test_flash_attention_takes_the_best_kernel_there_is(gpu, installed, dtype):
    gpu(8, "A100")
    installed("flash_attn")
    assert parse_args(["--no-tqdm", "--use_flash_attention", dtype]).attention == "flash_attention_2"
    installed("flash_attn", False)
    assert parse_args(["--no-tqdm", "--use_flash_attention", dtype]).attention == "sdpa"
    assert parse_args(["--no-tqdm", dtype]).attention == "sdpa"


def test_padding_free_rows_are_attended_sample_by_sample():
    assert parse_args(["--no-tqdm", "--padding_free"]).attention == "sdpa_packed"
    assert parse_args(["--no-tqdm", "--padding_free", "--attn_implementation", "eager"]).attention == "eager"


def test_flash_attention_on_an_old_gpu_is_refused(gpu):
    gpu(7, "Tesla V100")
    message = refusal("--use_flash_attention")
    assert "Tesla V100" in message
    assert "sdpa" in message


def test_flash_attention_in_float32_is_refused(gpu):
    gpu(8, "A100")
    assert "float32" in refusal("--use_flash_attention", "--fp16", "False")


def test_more_processes_than_gpus_are_refused(gpu, monkeypatch):
    gpu(8, "A100")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "at most 1" in refusal("--no-tqdm")


def test_flash_attn_that_is_asked_for_by_name_must_be_installed(installed):
    installed("flash_attn", False)
    assert "sdpa" in refusal("--attn_implementation", "flash_attention_2")


# ---- recomputation, compilation


@pytest.mark.parametrize(
    ("flags", "recompute", "checkpointing"),
    [
        ([], "full", True),
        (["--recompute", "vision"], "vision", True),
        (["--recompute", "none"], "none", False),
        (["--activation_checkpointing", "False"], "none", False),
        (["--gradient_checkpointing", "False"], "none", False),
        (["--activation_checkpointing"], "full", True),
    ],
    ids=call,
)
def test_recomputation_by_its_name_or_the_trainers(flags, recompute, checkpointing):
    args = parse_args(flags)
    assert args.recompute == recompute
    assert args.activation_checkpointing is checkpointing


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], None),
        (["--torch_compile"], {"backend": "inductor", "mode": None}),
        (["--torch_compile_backend", "aot_eager"], {"backend": "aot_eager", "mode": None}),
        (["--torch_compile_mode", "max-autotune"], {"backend": "inductor", "mode": "max-autotune"}),
    ],
    ids=call,
)
def test_the_layers_are_compiled_and_not_the_model(flags, options, monkeypatch):
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    args = parse_args(flags)
    assert args.compile_options == options
    assert not args.torch_compile
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ


# ---- bad values


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num_crops", "0"], "--num_crops 0"),
        (["--num_crops", "17"], "1 to 16"),
        (["--num_crops", "2.5"], "num_crops"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--batch_size", "sixteen"], "sixteen"),
        (["--batch_size_per_gpu", "0"], "batch_size"),
        (["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size 0"),
        (["--lora_rank", "0"], "--lora_rank 0"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0"),
        (["--lora_dropout", "1"], "--lora_dropout 1"),
        (["--lora_dropout", "-0.1"], "--lora_dropout -0.1"),
        (["--learning_rate", "-1"], "--learning_rate -1.0"),
        (["--learning_rate", "nan"], "--learning_rate nan"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0"),
        (["--warmup_steps", "-5"], "--warmup_steps -5"),
        (["--adam_beta2", "1"], "--adam_beta2 1"),
        (["--report_to", "magic"], "magic"),
        (["--report_to", "clearml"], "installed"),
        (["--fp16", "--bf16"], "--fp16"),
        (["--bf16", "perhaps"], "perhaps"),
        (["--optim", "magic"], "magic"),
        (["--attn_implementation", "fast"], "eager, sdpa, flash_attention_2"),
        (["--use_flash_attention", "--attn_implementation", "eager"], "--attn_implementation eager"),
        (["--no_such_flag"], "--no_such_flag"),
        (["--lora_ran", "8"], "--lora_ran"),  # no abbreviations: a flag added later must not change a call's meaning
        (["a_word"], "a_word"),
        (["--data_dir", "nowhere"], "--data_dir nowhere"),
        (["--data_dir", ".", "--full_train"], "--full_train with --data_dir"),
        (["--model_name_or_path", "nowhere"], "--model_name_or_path nowhere"),
        (["--model_name_or_path", "./no/where"], "no such folder"),
        (["--model_name_or_path", "."], "config.json"),
        (["--max_image_pixels", "0"], "--max_image_pixels 0"),
        (["--on_nonfinite", "perhaps"], "perhaps"),
        (["--recompute", "some"], "some"),
        (["--use_liger_kernel"], "--torch_compile"),
        (["--fsdp"], "--deepspeed zero3"),
        (["--use_qlora", "--deepspeed", "zero3"], "expected ZeRO-2 or none, found ZeRO-3"),
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere"),
        (["--output_dir", "/dev/null/output"], "--output_dir /dev/null/output"),
        (["--output_dir", ""], "--output_dir"),
        (["--seed", "-1"], "--seed -1: expected a number of at least 0"),
        (["--seed", "4294967296"], "--seed 4294967296: expected at most 4294967295"),
        (["--data_seed", "-1"], "--data_seed -1"),
        (["--batch_size", "100000000"], "--batch_size 100000000: expected at most 1000000"),
        (["--batch_size_per_gpu", "20000"], "--per_device_train_batch_size 20000: expected at most 10000"),
        (["--per_device_eval_batch_size", "20000"], "--per_device_eval_batch_size 20000: expected at most 10000"),
        (["--lora_rank", "100000"], "--lora_rank 100000: expected at most 3072"),
        (["--max_new_tokens", "1000000"], "--max_new_tokens 1000000: expected at most 131072"),
        (["--dataloader_num_workers", "1000"], "--dataloader_num_workers 1000: expected at most 256"),
        (["--max_bad_rows", "-1"], "--max_bad_rows -1"),
        (["--label_smoothing_factor", "1.5"], "--label_smoothing_factor 1.5: expected at most 1"),
        (["--label_smoothing_factor", "-0.1"], "--label_smoothing_factor -0.1"),
        (["--learning_rate", "inf"], "--learning_rate inf"),
        (["--weight_decay", "-1"], "--weight_decay -1"),
        (["--save_steps", "0"], "--save_steps 0"),
        (["--max_steps", "0"], "--max_steps 0: expected at least 1; --do_train False trains nothing"),
        (["--max_steps", "-2"], "--max_steps -2"),
        (["--do_predict"], "--do_predict: expected it left out"),
        (["--on_bad_row", "perhaps"], "perhaps"),
        (
            ["--lr_scheduler_kwargs", '{"typo": 1}'],
            "--lr_scheduler_kwargs {'typo': 1}: expected settings that it takes",
        ),
        (["--lr_scheduler_kwargs", "7"], "lr_scheduler_kwargs"),
        (
            ["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"lr_end": 5}'],
            "--lr_scheduler_type polynomial",
        ),
        (["--optim_args", "typo"], "--optim_args typo"),
        (["--optim", "rmsprop", "--optim_args", "alpha=much"], "--optim_args alpha=much"),
    ],
    ids=call,
)
def test_bad_values_are_refused_in_one_line(flags, named):
    assert named in refusal(*flags)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--logging_steps", "0"], "logging_steps"),
        (["--warmup_steps", "-1"], "warmup_steps"),
        (["--load_best_model_at_end", "--eval_strategy", "epoch"], "load_best_model_at_end"),
        (["--dataloader_num_workers", "-1"], "dataloader_num_workers"),
    ],
    ids=call,
)
def test_what_the_trainer_refuses_is_one_line_too(flags, named):
    assert named in refusal(*flags)


@pytest.mark.parametrize(
    "flags",
    [["--eval_size", "-1"], ["--max_length", "0"], ["--max_length", "-5"], ["--lora_alpha_ratio", "0"]],
    ids=call,
)
def test_a_value_that_would_do_something_else_is_refused(flags):
    # rows[:-1]; the default length; every row refused; adapters that change nothing
    assert flags[0] in refusal(*flags)


def test_a_refused_call_leaves_no_folder():
    refusal("--num_crops", "0")
    assert not Path("output").exists()


def test_the_limit_of_open_files_is_raised(monkeypatch):
    for limits, expected in (((64, 4096), (4096, 4096)), ((64, -1), (4096, -1)), ((1024, 2048), (2048, 2048))):
        found = []
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        monkeypatch.setattr(resource, "setrlimit", lambda _, limits, found=found: found.append(limits))
        parse_args([])
        assert found == [expected]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 128))
    assert "found 128" in refusal()


def test_resume_is_a_folder_or_true(tmp_path):
    for flags in (["--resume_from_checkpoint"], ["--resume_from_checkpoint", "true"]):
        assert parse_args(flags).resume_from_checkpoint == "True"
    assert parse_args(["--resume_from_checkpoint", str(tmp_path)]).resume_from_checkpoint == str(tmp_path)
    assert "--overwrite_output_dir" in refusal("--resume_from_checkpoint", "False")
    assert "one of them" in refusal("--resume_from_checkpoint", "--overwrite_output_dir")


# ---- where a run is written


@pytest.mark.parametrize(
    ("script", "folder"),
    [
        ("finetune_hf_trainer_docvqa.py", "output/docvqa"),
        ("/somewhere/else/finetune_hf_trainer_nlvr2.py", "output/nlvr2"),
        ("mine.py", "output/mine"),
        ("finetune_hf_trainer_.py", "output/run"),
        ("", "output/run"),
    ],
)
def test_each_script_has_a_folder_of_its_own(script, folder, monkeypatch):
    assert default_output_dir(script) == folder
    monkeypatch.setattr(sys, "argv", [script])
    assert parse_args([]).output_dir == folder
    assert Path(folder).is_dir()
    assert parse_args(["--output_dir", "mine"]).output_dir == "mine"


def output_in(folder: Path, kind: str) -> Path:
    place = {
        "the same": folder,
        "inside": folder / "output",
        "deeper": folder / "a" / "b",
        "by a link": folder.parent / "link",
        "with dots": folder / "images" / "..",
    }[kind]
    (folder.parent / "link").symlink_to(folder)
    return place


@pytest.mark.parametrize("kind", ["the same", "inside", "deeper", "by a link", "with dots"])
@pytest.mark.parametrize("flag", ["--data_dir", "--model_name_or_path"])
def test_what_a_run_reads_is_not_written_to(tmp_path, flag, kind):
    folder = tmp_path / "given"
    (folder / "images").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    place = output_in(folder, kind)
    message = refusal(flag, str(folder), "--output_dir", str(place))
    assert f"expected a folder apart from {flag} {folder}, found " in message
    assert ("the same folder" in message) == (kind in ("the same", "by a link", "with dots"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "images"]


def test_a_folder_beside_the_data_is_taken(tmp_path):
    (tmp_path / "data").mkdir()
    for place in ("data2", "output"):
        assert parse_args(["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / place)])
    # and data inside the folder of a run
    (tmp_path / "output" / "data").mkdir()
    assert parse_args(["--data_dir", "output/data", "--output_dir", "output"])


@pytest.mark.parametrize(
    ("flags", "trains"), [([], True), (["--do_train"], True), (["--do_train", "False"], False)], ids=str
)
def test_a_run_trains_unless_it_is_told_not_to(flags, trains):
    assert parse_args(flags).do_train is trains


def test_a_token_is_kept_for_the_hub_alone(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    args = parse_args(["--hub_token", "hf_secret"])
    assert args.hub_token is None
    assert os.environ["HF_TOKEN"] == "hf_secret"
    assert "hf_secret" not in repr(args)
    assert "hf_secret" not in json.dumps(args.to_dict(), default=str)


# ---- flags that do not exist


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lora_rnak", "--lora_rank"),
        ("--learning-rat", "--learning_rate"),
        ("--num_epochs", "--num_train_epochs"),
        ("--batch_szie=8", "--batch_size"),
        ("--freeze_vision", "--freeze_vision_model"),
        ("--output", "--output_dir"),
    ],
)
def test_an_unknown_flag_is_answered_with_what_may_be_meant(flag, meant):
    message = refusal(flag, "8")
    assert f"unrecognized arguments: {flag.split('=')[0]}; did you mean " in message
    assert meant in message or meant.replace("_", "-") in message


def test_a_flag_like_no_other_is_only_named():
    message = refusal("--zzzzqqqq", "1")
    assert message == "unrecognized arguments: --zzzzqqqq (--help lists all flags)"


# ---- settings of optimizer and schedule


@pytest.mark.parametrize(
    "flags",
    [
        ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"num_cycles": 2}'],
        ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-6}'],
        ["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"power": 2}'],
        ["--optim", "rmsprop", "--optim_args", "alpha=0.9,momentum=0.1"],
        ["--optim", "sgd"],
    ],
    ids=call,
)
def test_settings_that_fit_are_taken(flags):
    assert parse_args(flags)


@pytest.mark.parametrize("flags", [[], ["--optim", "adafactor"], ["--optim", "sgd"]], ids=call)
def test_settings_that_the_optimizer_would_ignore_are_refused(flags):
    assert "--optim_args nonsense=1" in refusal(*flags, "--optim_args", "nonsense=1")


def test_an_optimizer_that_is_not_installed_is_refused_before_a_model_is_loaded():
    assert "--optim stable_adamw: " in refusal("--optim", "stable_adamw")


@pytest.mark.parametrize("name", RANGES)
def test_the_ends_of_a_range_are_taken(name):
    for value in RANGES[name]:
        # an effective batch smaller than the micro-batch is one round
        if value is not None:
            # no workers: what they would need of the shared memory is another question
            flags = [
                "--dataloader_num_workers",
                "0",
                "--eval_strategy",
                "steps",
                *["--use_lora"] * name.startswith("lora"),
            ]
            args = parse_args([*flags, f"--{name}", str(value)])
            assert getattr(args, name) == value


# ---- the best model


@pytest.mark.parametrize("flags", [["--early_stopping_patience", "2"], ["--metric_for_best_model", "anls"]], ids=call)
def test_what_goes_by_evaluations_needs_some(flags):
    line = refusal(*flags)
    assert f"{' '.join(flags)}: expected --eval_strategy steps or epoch beside it" in line
    args = parse_args([*flags, "--eval_strategy", "epoch"])
    # the Trainer's own name for what is not chosen
    assert args.metric_for_best_model == ("anls" if "anls" in flags else "loss")
    # else a resumed run would begin to count anew
    assert args.restore_callback_states_from_checkpoint == ("anls" not in flags)


# ---- --help


@pytest.fixture
def help_groups(monkeypatch, capsys) -> dict[str, str]:
    """The text of --help by the title of its groups."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        parse_args(["--help"])
    assert ended.value.code == 0
    parts = re.split(r"^(\S.*):\n", capsys.readouterr().out, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_help_shows_every_flag_of_the_recipe_in_a_group(help_groups):
    assert set(GROUPS) <= set(help_groups)
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    shown = {title: re.findall(r"^  --(\w+)", text, re.MULTILINE) for title, text in help_groups.items()}
    grouped = [name for title in GROUPS for name in shown[title]]
    assert len(grouped) == len(set(grouped))
    assert {field.name for field in dataclasses.fields(RecipeArguments)} - inherited <= set(grouped)
    assert inherited <= set(grouped) | set(shown["Hugging Face TrainingArguments"])
    for flag, _, _, _ in PUBLISHED:
        assert any(re.search(rf"{flag}\b", text) for text in help_groups.values()), flag


def test_every_flag_of_the_recipe_has_a_help_text_with_its_default():
    for field in dataclasses.fields(RecipeArguments):
        if field.name in RecipeArguments.__annotations__:
            assert len(field.metadata.get("help", "")) > 10, field.name


def test_help_gives_defaults_and_usage(help_groups):
    every = " ".join(" ".join(help_groups.values()).split())
    for default in ("microsoft/Phi-3.5-vision-instruct", "4e-05", "0.95", "1e-07", "output/ and the script's task"):
        assert f"(default: {default})" in every


def test_help_says_torchrun(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune_hf_trainer_docvqa.py", "--help"])
    with pytest.raises(SystemExit):
        parse_args()
    assert "torchrun --nproc_per_node=GPUS finetune_hf_trainer_docvqa.py [flags]" in capsys.readouterr().out
