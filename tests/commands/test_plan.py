"""`python -m finetuning.plan`: rows, what fits, the command, hours and price, from flags, data and no GPU."""

import json
import re
import shlex

import pytest
import recipe

from finetuning import plan
from finetuning.arguments import parse_args
from finetuning.training.fitting import Setting, deepspeed_configs, setting_of
from finetuning.training.parts import STRATEGIES
from phi3v import Phi3VConfig

own_process = pytest.fixture(autouse=True)(recipe.own_process)
A100 = ["--gpus", "8", "--gpu_memory", "80"]


@pytest.fixture
def call(capsys):
    def run(*argv):
        capsys.readouterr()  # what fixtures have said
        status = plan.main([str(word) for word in argv])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def tiny_folder(tmp_path):
    return recipe.model_folder(tmp_path / "model")


def test_the_rows_are_a_json_list(call):
    status, out, _ = call(*A100, "--json")
    rows = json.loads(out)
    assert status == 0
    assert {frozenset(row) for row in rows} == {
        frozenset({"strategy", "deepspeed", "gpus", "recompute", "micro_batch", "peak_gib", "fits"})
    }
    found = {(row["strategy"], row["deepspeed"], row["recompute"], row["micro_batch"]): row for row in rows}
    assert len(found) == len(rows)
    assert {row["strategy"] for row in rows} == {"full", "frozen", "lora", "qlora"}
    assert {row["recompute"] for row in rows} == {"full", "vision", "none"}
    assert {row["gpus"] for row in rows} == {8}
    peaks = {key: row["peak_gib"] for key, row in found.items()}
    # More in each direction, and 8 whole pages without recomputation over any GPU.
    assert peaks["qlora", "none", "full", 1] < peaks["lora", "none", "full", 1] < peaks["full", "none", "full", 1]
    assert peaks["full", "zero2", "full", 1] < peaks["full", "zero2", "vision", 1] < peaks["full", "zero2", "none", 1]
    assert peaks["full", "zero2", "none", 1] < peaks["full", "zero2", "none", 8]
    assert not found["full", "zero2", "none", 8]["fits"]
    assert found["full", "zero2", "full", 1]["fits"]
    assert all(row["fits"] == (row["peak_gib"] < 75.83) for row in rows)


def test_more_gpus_leave_more_room_on_each(call):
    def peak(gpus: int, engine: str) -> float:
        rows = json.loads(call("--gpus", gpus, "--gpu_memory", 80, "--json")[1])
        keys = ("full", engine, "full", 1)
        names = ("strategy", "deepspeed", "recompute", "micro_batch")
        return next(row["peak_gib"] for row in rows if tuple(row[name] for name in names) == keys)

    # 16 bytes a parameter of 4.13e9, shared
    assert peak(1, "zero2") - peak(8, "zero2") == pytest.approx(16 * 4.134e9 * 7 / 8 / 2**30, rel=0.01)


def test_the_report_recommends_a_command_with_its_memory_time_and_price(call):
    status, out, _ = call(*A100, "--rows", 64000, "--batch_size", 64, "--dollars_per_gpu_hour", 2)
    assert status == 0
    lines = {line[:11].strip(): line[13:] for line in out.splitlines()}
    assert lines["recommended"].startswith("torchrun --nproc_per_node=8 finetune_hf_trainer_docvqa.py --bf16")
    assert "--batch_size 64" in lines["recommended"]
    peak, *parts = map(float, re.findall(r"(\d+\.\d)", lines["memory"]))
    assert peak == pytest.approx(sum(parts), abs=0.3)
    assert "1000 steps of 64" in lines["time"]
    hours, dollars = (float(re.search(rf"([\d.]+) {unit}", lines["time"])[1]) for unit in ("hours", "dollars"))
    assert dollars == pytest.approx(hours * 8 * 2, rel=0.02)
    assert "--recompute" in lines["if it fails"]


def test_the_largest_strategy_that_fits_is_recommended(call):
    def recommended(*flags) -> str:
        return re.search("recommended  (.*)", call(*flags)[1])[1]

    assert "--use_lora" in recommended("--gpus", 1, "--gpu_memory", 24)
    assert "--use_qlora" in recommended("--gpus", 1, "--gpu_memory", 12)
    assert "--use_lora" not in recommended("--gpus", 8, "--gpu", "V100")
    # no bfloat16 there
    assert "--bf16" not in recommended("--gpus", 8, "--gpu", "V100")
    assert "nothing fits" in recommended("--gpus", 1, "--gpu_memory", 6)
    # what the flags choose is kept to
    assert "--use_lora" in recommended(*A100, "--use_lora")
    assert "--freeze_vision_model" in recommended(*A100, "--freeze_vision_model")


@pytest.mark.parametrize("engine", [*deepspeed_configs(), "own.json", '{"zero_optimization": {"stage": 2}}'])
def test_a_setting_is_what_its_flags_say(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e7}}')
    for strategy in STRATEGIES:
        if strategy != "qlora" or "zero3" not in engine:
            setting = Setting(strategy, engine, "vision", 2)
            assert setting_of(plan.run_arguments(shlex.split(setting.flags()))) == setting


@pytest.mark.parametrize(
    "flags",
    [
        [*A100, "--deepspeed", "zero3"],
        [*A100, "--use_lora", "--lora_alpha_ratio", "1", "--deepspeed", "zero2"],
        ["--gpus", "1", "--gpu_memory", "24", "--use_qlora", "--num_crops", "4", "--lr_scheduler_type", "cosine"],
        ["--gpus", "4", "--gpu_memory", "24", "--freeze_vision_model", "--wd", "0.1", "--max_steps", "9"],
        [
            *("--gpus", "1", "--gpu", "H100", "--optim", "paged_adamw_8bit"),
            *("--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"num_cycles": 2}'),
        ],
        [*A100, "--deepspeed", '{"zero_optimization": {"stage": 1}}'],
    ],
    ids=" ".join,
)
def test_the_recommended_command_is_one_that_the_script_takes(call, flags, tiny_folder):
    status, out, err = call(*flags)
    assert (status, err) == (0, "")
    launcher, _, script, *words = shlex.split(re.search("recommended  (.*)", out)[1])
    assert (launcher, script) == ("torchrun", "finetune_hf_trainer_docvqa.py")
    if "--use_flash_attention" in words:  # which a CPU has not
        words.remove("--use_flash_attention")
    args = parse_args([*words, "--model_name_or_path", str(tiny_folder), "--output_dir", "output"])
    given = plan.run_arguments(flags[4:])
    names = ["use_lora", "use_qlora", "freeze_vision_model", "lora_alpha_ratio", "weight_decay", "max_steps", "optim"]
    names += ["num_crops", "lr_scheduler_type", "lr_scheduler_kwargs"]
    names += ["deepspeed_config"] * ("--deepspeed" in flags)
    assert [getattr(args, name) for name in names] == [getattr(given, name) for name in names]


def test_gpu_flags_are_no_fault_without_a_gpu(call):
    for flags in (["--use_flash_attention", "--bf16"], ["--fp16"], ["--attn_implementation", "flash_attention_2"]):
        status, out, err = call(*A100, *flags)
        assert (status, err) == (0, ""), flags
        assert "recommended" in out


def test_an_8_bit_optimizer_counts(call):
    def first(*flags) -> float:
        return json.loads(call("--gpus", 1, "--gpu_memory", 80, "--json", *flags)[1])[0]["peak_gib"]

    assert first("--optim", "paged_adamw_8bit") < first()


def test_the_data_folder_gives_the_samples(call, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "model_config", lambda _: Phi3VConfig())  # whose steps are stored
    data = recipe.docvqa_rows(tmp_path / "data", train=8, test=2)
    flags = [*A100, "--data_dir", data, "--model_name_or_path", tiny_folder, "--num_crops", 2]
    status, out, err = call(*flags, "--task", "docvqa", "--batch_size", 4)
    assert (status, err) == (0, "")
    # of at most a global view and two crops, and 8 rows
    assert re.search(r"sample +\d+ tokens, 3 crops \(.*data\); on average \d+ and 2\.\d", out)
    assert "2 steps of 4 (8 samples)" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpus", "8", "--gpu_memroy", "80"], "--gpu_memory"),
        (["--gpu_memory", "80", "--batch_sise", "4"], "did you mean --batch_size"),
        (["--gpus", "-1", "--gpu_memory", "80"], "--gpus -1: expected a number of at least 1"),
        (["--gpu_memory", "nan"], "--gpu_memory nan"),
        (["--gpu", "H1000"], "expected one of T4"),
        (["--gpus", "8"], "no GPU is here: expected --gpu_memory"),
        ([*A100, "--data_dir", "nowhere"], "--data_dir nowhere: no such folder"),
        (
            [*A100, "--deepspeed", "zero4"],
            "--deepspeed zero4: expected zero2, zero2_offload, zero3, zero3_offload, a file",
        ),
        ([*A100, "--use_qlora", "--deepspeed", "zero3"], "--use_qlora with --deepspeed zero3: expected ZeRO-2 or none"),
        ([*A100, "--lora_rank", "0"], "--lora_rank 0"),
    ],
    ids=" ".join,
)
def test_a_bad_call_is_one_line(call, flags, said):
    status, out, err = call(*flags)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("fault", ["not json\n", '{"id": "a"}\n', ""])
def test_rows_that_cannot_be_read_are_one_line(call, fault, tiny_folder, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(fault)
    status, out, err = call(*A100, "--data_dir", folder, "--model_name_or_path", tiny_folder)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert "train" in err
