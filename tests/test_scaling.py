"""Scaling: the model of communication is the one counted by hand, DeepSpeed sends what it says, the command runs and writes."""

import json
import sys

import pytest
import recipe
import torch

from benchmarks import models, scaling
from finetuning.training import loading as strategy
from phi3v import Phi3VForCausalLM

own_process = pytest.fixture(autouse=True)(recipe.own_process)


def test_bytes_of_a_rank_are_those_counted_by_hand():
    # 4 ranks, 1000 parameters in bf16: an all-reduce of 2000 bytes sends 3/4 of them twice, a gather once.
    assert scaling.sent(scaling.Work("full", 1000, 1.0, 0.5), 4) == {"reduce": 3000, "gather": 1500}
    assert scaling.sent(scaling.Work("frozen", 1000, 1.0, 0.5), 4) == {"reduce": 3000, "gather": 1500}
    # Adapters in fp32, by DDP, which leaves nothing to gather.
    assert scaling.sent(scaling.Work("lora", 1000, 1.0, 0.5), 4) == {"reduce": 6000, "gather": 0}


def test_seconds_that_are_not_hidden_are_those_counted_by_hand():
    # 2 ranks, two buckets of 5e8 parameters: 2e9 bytes a reduction, 1e9 a gather.
    full = scaling.Work("full", 1_000_000_000, 3.0, 2 / 3)
    # 1 s and 0.5 s at 2 GB/s: of each reduction the first half is hidden in the 2 s of the backward pass.
    expected = {"communication": 4 * 1 + 0.5, "not_hidden": 4 * 0.5 + 0.5, "seconds": 12 + 2.5}
    assert scaling.predict(full, 2, 2, 4) == pytest.approx(expected)
    # 4 s at 0.5 GB/s: the first bucket can start after 1 s of the backward pass, both take 4 s, so 5 s instead of 2 s.
    expected = {"communication": 2 * 4 + 2, "not_hidden": 2 * 3 + 2, "seconds": 6 + 8}
    assert scaling.predict(full, 2, 0.5, 2) == pytest.approx(expected)
    # 4 buckets of adapters in the last of 8 micro-batches: 4 x 26,214,400 bytes at 0.1048576 GB/s are 1 s, a quarter of it late.
    lora = scaling.Work("lora", 4 * 6_553_600, 3.0, 0.5)
    expected = {"communication": 1, "not_hidden": 0.25, "seconds": 24.25}
    assert scaling.predict(lora, 2, 0.1048576, 8) == pytest.approx(expected)


@pytest.mark.parametrize("name", scaling.TRAINED)
def test_the_trained_parameters_are_those_of_the_recipes(name, tmp_path):
    args = models.recipe_arguments(models.build_folder("tiny", tmp_path, torch.float32), name)
    with torch.device("meta"):
        model = Phi3VForCausalLM(models.config("full"))
        strategy.unused_layers(model).requires_grad_(False)
        if args.freeze_vision_model:
            model.model.vision_embed_tokens.requires_grad_(False)
        model = strategy.add_lora(model, args) if args.use_lora else model
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == scaling.TRAINED[name]


def test_a_full_page_at_the_assumed_speed_takes_its_flops():
    page = scaling.work("full")
    assert page.seconds * 798e12 * 0.55 == pytest.approx(75.6e12, rel=0.001)  # counted for DocVQA
    assert page.backward == pytest.approx(2 / 3, abs=0.001)


def test_the_model_is_near_the_published_speeds_of_more_nodes(capsys):
    for case in scaling.plausible()["A100, 8 x 200 Gb/s"].values():
        assert case["predicted"] == pytest.approx(case["published"], rel=0.02)
    assert "16 GPUs" in capsys.readouterr().out


def test_efficiency_is_images_a_second_over_those_of_as_many_single_processes():
    seconds = {1: [[1.0, 1.0, 9.0], [1.0, 1.0, 1.0]], 2: [[1.25, 1.25, 1.5]]}
    given = {"cpu_seconds": [0.5], "trained_parameters": 3, "collectives": {}}
    runs = {number: [{"seconds": one} | given for one in rounds] for number, rounds in seconds.items()}
    found = scaling.summary(runs, images=8)
    assert [found[number]["img_per_s"] for number in "12"] == [8, 12.8]
    assert found["1"]["rounds"] == [1.0, 1.0]
    assert found["2"]["cpu_seconds"] == 0.5
    assert found["efficiency"] == 0.8


def test_a_run_on_one_and_two_processes_sends_what_the_model_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "MEASURED", ("full",))
    result = tmp_path / "scaling.json"
    monkeypatch.setattr(sys, "argv", ["scaling", "--rounds", "1", "--steps", "2", "--result", str(result)])
    scaling.main()
    found = json.loads(result.read_text())
    one, two = (found["measured"]["full"][number] for number in "12")
    # Two micro-batches of 4 images for each process.
    assert one["img_per_s"] == pytest.approx(8 / one["seconds"], rel=0.01)
    assert two["img_per_s"] == pytest.approx(16 / two["seconds"], rel=0.01)
    # float32 here: all-reduced as a whole in each of two micro-batches, gathered once; and a few scalars.
    size = 4 * two["trained_parameters"]
    assert two["collectives"].keys() == {"all_reduce", "all_gather_into_tensor"}
    assert two["collectives"]["all_reduce"] == pytest.approx(2 * size, abs=100)
    assert two["collectives"]["all_gather_into_tensor"] == pytest.approx(size, abs=100)
    assert found["model"]["full"]["steps"]["8 x 400 Gb/s"].keys() == {"16", "32", "64"}
    assert "efficiency" in capsys.readouterr().out
