"""The memory model: fake steps against real ones, DeepSpeed's parts against DeepSpeed, and what a run makes of it."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import recipe
import tiny
import torch

from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import ConversationDataset
from finetuning.data.encoding import encode_conversation
from finetuning.errors import RunError
from finetuning.results import answering
from finetuning.training import fitting
from finetuning.training.fake_step import Batch, FakeModel, Live, whole
from finetuning.training.fitting import (
    Planner,
    Setting,
    advice,
    deepspeed_configs,
    larger,
    least_recomputation,
    smaller,
)
from finetuning.training.identity import write_run
from finetuning.training.loading import load_model
from finetuning.training.memory import GIB, Activations, Parameters, plan_memory, stored, usable_bytes
from finetuning.training.parts import keep_text_activations
from finetuning.training.progress import Progress
from finetuning.training.summary import print_summary
from finetuning.training.trainer import RecipeTrainer
from phi3v import Phi3VConfig

ROOT = Path(__file__).parents[2]
own_process = pytest.fixture(autouse=True)(recipe.own_process)
PAGE = Batch(1, 2529, 17, 12)
FULL, FROZEN, LORA, QLORA = [], ["--freeze_vision_model"], ["--use_lora"], ["--use_qlora"]
ZERO2 = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "data_types": {"grad_accum_dtype": "fp32"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return recipe.model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def arguments(folder):
    return lambda *flags: recipe.arguments(folder, "--bf16", "--deepspeed", "none", *flags)


# ---- what a micro-batch takes


def real_peak(args, recompute: str) -> tuple[int, Batch]:
    """Bytes of a real step on the CPU beside weights and finished gradients, and what the step was of."""
    model = load_model(args).train()
    sample = Conversation("a", [Turn("What is it?", ["a cat"], [tiny.picture(60, 40)])])
    features = encode_conversation(sample, tiny.processor(2))
    batch = DataCollatorForPhi3V(tiny.TOKENIZER.pad_token_id)([features])
    del batch["ids"], batch["attention_mask"]
    if recompute != "none":
        model.activation_checkpointing_enable()
    if recompute == "vision":
        keep_text_activations(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda found: setattr(found, "grad", None))
    inputs, live = batch, Live()
    live.begin(model)
    with live:
        inputs = {name: value.clone() for name, value in batch.items()}
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
    labels = sum(label != -100 for label in features["labels"])
    return live.peak, Batch(1, len(features["input_ids"]), len(batch["pixel_values"]), labels)


@pytest.mark.parametrize("recompute", ["full", "vision", "none"])
@pytest.mark.parametrize("flags", [FULL, FROZEN, LORA], ids=" ".join)
def test_a_fake_step_takes_what_a_real_one_does(flags, recompute, arguments):
    args = arguments(*flags)
    found, batch = real_peak(args, recompute)
    planned = whole(tiny.config(), FakeModel(tiny.config(), args).step(batch, recompute)).peak
    assert planned == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("recompute", ["full", "vision", "none"])
@pytest.mark.parametrize("flags", [FULL, QLORA], ids=" ".join)
def test_a_middle_layer_stands_for_all_others(flags, recompute, arguments):
    config = tiny.config(num_hidden_layers=9)
    config.vision_config.num_hidden_layers = 8
    batch = Batch(2, 100, 5, 8, masked=True)
    args = arguments(*flags)
    steps = [FakeModel(config, args, *layers).step(batch, recompute) for layers in ((4, 5), (9, 8))]
    few, every = (whole(config, step) for step in steps)
    assert few.peak == pytest.approx(every.peak, rel=0.03)
    assert few.traffic == pytest.approx(every.traffic, rel=0.01)


@pytest.mark.parametrize("batch", [PAGE, Batch(3, 900, 6, 40, masked=True)], ids=["page", "padded"])
@pytest.mark.parametrize(("flags", "recompute"), [(FULL, "none"), (FROZEN, "full"), (LORA, "vision")])
def test_what_is_stored_of_the_official_sizes_is_what_their_code_takes(flags, recompute, batch, arguments):
    model = Activations(Phi3VConfig(), arguments("--lora_rank", "64", *flags))
    found = whole(model.config, model.model.step(batch, recompute)).peak
    assert stored(model.config, arguments("--lora_rank", "64", *flags)) is not None
    # The model has changed? `python -m benchmarks.plan --fit` stores it anew.
    assert model.of(batch, recompute).peak == pytest.approx(found, rel=0.04)


def test_another_rank_or_model_takes_a_step_of_its_own(arguments):
    assert stored(Phi3VConfig(), arguments("--use_lora", "--lora_rank", "8")) is None
    assert stored(tiny.config(), arguments()) is None
    small, large = (Activations(tiny.config(), arguments(*LORA, "--lora_rank", rank)) for rank in ("2", "32"))
    assert small.of(Batch(1, 64, 2, 4), "none").peak < large.of(Batch(1, 64, 2, 4), "none").peak


# ---- weights, gradients, optimizer states, buffers


def zero(stage: int, accumulate: str | None = "fp32", overlap: bool = True) -> dict:
    config = {
        "zero_optimization": {"stage": stage, "overlap_comm": overlap, "reduce_bucket_size": 200000},
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return config | ({"data_types": {"grad_accum_dtype": accumulate}} if accumulate else {})


def planned(config: dict | None, parameters: Parameters, gpus: int = 1, optim: str = "adamw_torch_fused"):
    args = SimpleNamespace(compute_dtype=torch.bfloat16, optim=optim, deepspeed_config=config)
    return plan_memory(args, parameters, 0, gpus, 3072)


def test_deepspeed_allocates_what_is_planned():
    configs = [zero(1), zero(2), zero(2, None), zero(2, overlap=False), zero(3)]
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = str(taken.getsockname()[1])
    command = [sys.executable, str(Path(__file__).with_name("zero_bytes.py")), json.dumps(configs), port]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    peaks = json.loads(re.search(r"peaks (\[.*\])", done.stdout)[1])
    count = 12 * 320 * 320
    for config, peak in zip(configs, peaks, strict=True):
        # one gradient at a time beside the buckets is part of the activations
        assert planned(config, Parameters(count, 0, count, 320 * 320, 2)).peak == pytest.approx(peak, rel=0.02), config


def test_each_part_by_its_bytes_a_parameter():
    p = Parameters(1000, 0, 1000, 10, 2)
    assert vars(planned(None, p)) == {
        "weights": 2000,
        "gradients": 2000,
        "optimizer": 4000,
        "activations": 0,
        "buffers": 0,
    }
    assert planned(None, p, gpus=2).buffers == 2000
    found = planned(ZERO2, p, gpus=4)
    assert (found.weights, found.gradients, found.optimizer) == (2000, 1000, 3000)
    # two buckets of 5e8 elements, and no more to join than there is
    assert found.buffers == 2 * 2 * 5e8 + 2 * 1000 + 4 * 10
    sharded = planned({"zero_optimization": {"stage": 3}}, p, gpus=4)
    assert (sharded.weights, sharded.gradients, sharded.optimizer) == (500, 1000, 3000)
    assert planned(ZERO2, p, optim="paged_adamw_8bit").optimizer == pytest.approx((4 + 2.03) * 1000, rel=0.001)
    offloaded = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert (planned(offloaded, p).gradients, planned(offloaded, p).optimizer) == (0, 0)
    # adapters in float32 over weights in nf4 and in 16 bits
    quantised = planned(None, Parameters(1000, 800, 100, 10, 4))
    assert quantised.weights == pytest.approx(100 * 2 + 800 * 0.516 + 400, rel=0.001)
    assert (quantised.gradients, quantised.optimizer) == (400, 800)


def test_the_official_model_has_its_parameters(arguments):
    full = Activations(Phi3VConfig(), arguments()).parameters
    assert (full.all, full.trained, full.largest) == (4_146_621_440, 4_134_023_168, 32064 * 3072)
    lora = Activations(Phi3VConfig(), arguments(*QLORA, "--lora_rank", "64")).parameters
    assert lora.trained_bytes == 4
    # all linear layers of the language model but the head
    assert lora.quantised == 32 * (3072 * 9216 + 3072 * 3072 + 3072 * 16384 + 8192 * 3072)


def test_a_gpu_sold_as_80_gb_has_a_little_less_to_give():
    assert 74 < usable_bytes(80) / GIB < 78


# ---- what a run takes


@pytest.fixture
def planner(arguments):
    return Planner(Phi3VConfig(), arguments("--lora_rank", "64"), 8, 2529, 17)


def test_the_least_recomputation_that_fits_is_taken(planner):
    setting = Setting("full", "zero2", "auto", 1)
    peaks = {name: planner.memory(Setting("full", "zero2", name, 1)).peak for name in ("none", "vision", "full")}
    assert peaks["full"] < peaks["vision"] < peaks["none"]
    for name, peak in peaks.items():
        assert least_recomputation(planner, setting, peak + 1) == name
    assert least_recomputation(planner, setting, peaks["full"] - 1) == "full"


def test_the_largest_micro_batch_that_fits_is_said(planner):
    setting = Setting("full", "zero2", "full", 1)
    free = planner.memory(Setting("full", "zero2", "full", 4)).peak
    for batch_size, said in ((64, 4), (16, 2), (8, None), (24, None)):  # of 24 two a GPU would leave places empty
        planner.args.batch_size = batch_size
        assert larger(planner, setting, free).startswith(f"; --batch_size_per_gpu {said} fits too" if said else "")
        assert bool(larger(planner, setting, free)) == bool(said)
    planner.args.batch_size = 64
    assert larger(planner, setting, planner.memory(setting).peak) == ""


def test_smaller_settings_come_in_turn():
    found = list(smaller(Setting("full", "zero2", "none", 4)))
    assert found[0] == Setting("full", "zero2", "vision", 4)
    assert Setting("full", "zero2", "full", 1) in found
    assert found[-1] == Setting("qlora", "none", "full", 1)
    assert not list(smaller(Setting("qlora", "none", "full", 1)))


def test_the_advice_is_what_fits_or_that_nothing_is_known(planner):
    setting = Setting("full", "zero2", "none", 2)
    assert "--recompute full" in advice(planner, setting, 24 * GIB)
    assert "--use_lora" in advice(planner, setting, 12.4 * GIB) or "zero" in advice(planner, setting, 12.4 * GIB)
    assert "no smaller setting is known" in advice(planner, setting, 2 * GIB)
    # What has not fitted needs more than was planned.
    assert advice(planner, setting, float("inf")).startswith("--recompute vision")


def dataset(count: int = 4) -> ConversationDataset:
    def to_conversation(number):
        return Conversation(f"row-{number}", [Turn("What is it?", ["a cat"], [tiny.picture(60, 40, number)])])

    return ConversationDataset(range(count), to_conversation, tiny.processor(2), [60] * count)


def gpu(monkeypatch, free: float):
    """What a run asks of a GPU, of one with so many free bytes."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)


@pytest.mark.parametrize(("free", "taken"), [(1e9, "none"), (1e5, "full")])
def test_a_run_on_a_gpu_settles_recompute_auto(free, taken, arguments, monkeypatch):
    args = arguments()
    model = load_model(args)
    gpu(monkeypatch, free)
    args.recompute = "auto"  # which a CPU makes full
    stand_in = SimpleNamespace(**{name: getattr(args, name) for name in dir(args) if not name.startswith("_")})
    stand_in.device, stand_in.world_size = torch.device("cuda"), 1
    said = fitting.settle_memory(model, stand_in, dataset())
    assert stand_in.recompute == taken
    assert stand_in.activation_checkpointing == (taken != "none")
    assert stand_in.planned_peak > 0
    assert f"--recompute auto takes {taken}" in said
    assert ("may not fit" in said) == (free < 1e6)


def test_a_plan_that_fails_ends_no_run(arguments, monkeypatch):
    args = arguments()
    gpu(monkeypatch, 1e9)
    monkeypatch.setattr(fitting, "planner_of", lambda *_: 1 / 0)
    names = {name: getattr(args, name) for name in dir(args) if not name.startswith("_")}
    stand_in = SimpleNamespace(**names | {"device": torch.device("cuda"), "world_size": 1, "recompute": "auto"})
    assert "not planned" in fitting.settle_memory(None, stand_in, dataset())
    assert stand_in.recompute == "full"


def test_on_a_cpu_nothing_is_planned_and_all_is_recomputed(folder, capsys):
    args = recipe.arguments(folder)
    assert args.recompute == "full"
    write_run(Path(args.output_dir), {})
    print_summary(load_model(args), args, dataset())
    assert "planned" not in capsys.readouterr().out
    assert not args.planned_peak


@pytest.mark.parametrize("planned_peak", [0, 2 * GIB])
def test_the_end_of_a_run_holds_the_plan_against_what_was_measured(planned_peak, capsys):
    progress = Progress()
    progress._peak = 3 * GIB
    state = SimpleNamespace(is_world_process_zero=True)
    progress.on_train_end(SimpleNamespace(planned_peak=planned_peak), state, None)
    said = capsys.readouterr().out
    assert said == ("peak memory: 2.0 GiB planned, 3.0 GiB measured (+50.0%)\n" if planned_peak else "")


def test_out_of_memory_in_training_names_what_would_have_fitted(folder, monkeypatch):
    args = recipe.arguments(
        folder, "--use_lora", "--batch_size_per_gpu", "2", "--recompute", "none", "--max_steps", "1"
    )
    write_run(Path(args.output_dir), {})
    model = load_model(args)
    trainer = RecipeTrainer(
        model=model, args=args, train_dataset=dataset(), data_collator=DataCollatorForPhi3V(tiny.TOKENIZER.pad_token_id)
    )

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    monkeypatch.setattr(trainer, "compute_loss", full)
    with pytest.raises(RunError) as caught:
        trainer.train()
    said = str(caught.value)
    assert "\n" not in said
    assert "Tried to allocate 2.00 GiB." in said
    assert "--use_lora --recompute vision --batch_size_per_gpu 2 takes" in said
    assert "there is no checkpoint yet" in said


@pytest.mark.parametrize(("size", "cure"), [(4, "--per_device_eval_batch_size 2 instead of 4"), (1, "--num_crops")])
def test_out_of_memory_in_answering_names_the_batch(size, cure, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(answering, "greedy_answers", full)
    args = SimpleNamespace(device=torch.device("cpu"), max_new_tokens=4)
    inputs = SimpleNamespace(to=lambda _: None)
    with pytest.raises(RunError, match=re.escape(cure)):
        answering._generate(None, None, inputs, [None] * size, args)


def test_the_configs_are_planned_by_their_names():
    assert {"none", "zero2"} <= set(deepspeed_configs())
