"""The speed benchmarks: the reference mode is the same model, FLOPs are counted right, each command runs and writes."""

import json
import sys

import pytest
import recipe
import torch

from benchmarks import epoch, evaluate, gpu, gpu_checks, levers, models, preprocess, train_step
from finetuning.arguments import RecipeArguments, _Parser
from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.encoding import encode_conversation
from finetuning.training.loading import load_model, load_processor
from phi3v import Phi3VConfig

own_process = pytest.fixture(autouse=True)(recipe.own_process)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.build_folder("tiny", tmp_path_factory.mktemp("model"), torch.float32)


def call(module, result, *flags: str) -> dict:
    """Runs a command in this process; returns what it wrote."""
    argv, sys.argv = sys.argv, ["benchmark", *flags, "--result", str(result)]
    try:
        module.main()
    finally:
        sys.argv = argv
    return json.loads(result.read_text())


@pytest.mark.parametrize("strategy", ["full", "frozen", "lora"])
@pytest.mark.parametrize("image", ["photo", "meme"])
def test_the_reference_mode_gives_the_loss_and_gradients_of_the_product(strategy, image, folder):
    flags = ["--num_crops", "6", "--fp16", "False"]
    args = models.recipe_arguments(folder, strategy, *flags)
    args.use_cpu = True
    processor, model = load_processor(args), load_model(args).train()
    batch = DataCollatorForPhi3V(0)([encode_conversation(models.sample(image), processor)])
    del batch["ids"]
    found = {}
    for loss_of in (train_step.product_loss, train_step.reference_loss):
        if loss_of is train_step.reference_loss:
            models.base_of(model).set_attn_implementation("eager")
            batch["pixel_values"] = train_step.pad_crops(batch["pixel_values"], 6)
            assert batch["pixel_values"].shape[:2] == (1, 7)  # 5 of them real
        model.zero_grad()
        loss = loss_of(model, batch, train_step.Clock("cpu"))
        loss.backward()
        found[loss_of] = loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    (loss, gradients), (expected, expected_gradients) = found.values()
    assert loss == pytest.approx(expected, abs=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


def test_model_flops_of_the_tiny_model_are_those_counted_by_hand():
    config = models.config("tiny")
    assert models.base_of(config) is config
    # Language model: 2 layers of 64 -> 192, 64 -> 64, 64 -> 256, 128 -> 64 and a head of 64 -> 410 or so.
    # CLIP: 2 of 3 layers of 64 with 256 inside, 8 x 8 patches of 14 x 14 x 3 and a class token; projector 256 -> 64 -> 64.
    tokens, crops, labels = 50, 2, 5
    text = 2 * tokens * 2 * (64 * 192 + 64 * 64 + 64 * 256 + 128 * 64) + 2 * labels * 64 * config.vocab_size
    text_attention = 2 * 2 * 64 * (30**2 + 20**2)  # causal: half of two products of 2 x n x n x 64
    patches = 2 * crops * 64 * (3 * 14 * 14) * 64
    clip = 2 * (crops * 65) * 2 * (4 * 64 * 64 + 2 * 64 * 256) + 2 * (crops * 16) * (256 * 64 + 64 * 64)
    clip_attention = 2 * 4 * crops * 65**2 * 64
    forward = text + text_attention + patches + clip + clip_attention
    found = train_step.step_flops(config, [30, 20], crops, labels, "full")
    # the pixels need no gradient
    assert found == {"forward": forward, "step": 3 * forward - patches}
    found = train_step.step_flops(config, [30, 20], crops, labels, "frozen")
    assert found == {"forward": forward, "step": forward + 2 * (text + text_attention)}
    rank = 4
    pairs = 2 * tokens * 2 * rank * ((64 + 192) + (64 + 64) + (64 + 256) + (128 + 64))
    pairs += 2 * labels * rank * (64 + config.vocab_size)
    pairs += 2 * (crops * 65) * 2 * rank * (4 * (64 + 64) + 2 * (64 + 256))
    pairs += 2 * (crops * 16) * rank * ((256 + 64) + (64 + 64))
    found = train_step.step_flops(config, [30, 20], crops, labels, "lora", rank)
    backward = text + clip + 2 * (text_attention + clip_attention + pairs)
    assert found == {"forward": forward + pairs, "step": forward + pairs + backward}


def test_the_medium_model_has_the_size_of_the_targets():
    with torch.device("meta"):
        model = train_step.base_of(models.Phi3VForCausalLM(models.config("medium")))
    assert 171e6 < sum(parameter.numel() for parameter in model.parameters()) < 173e6


def test_the_full_model_has_the_official_sizes():
    with torch.device("meta"):
        model = models.Phi3VForCausalLM(models.config("full"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_146_621_440


def test_memory_is_the_most_that_is_allocated_at_once():
    def step():
        kept = torch.ones(32 * 2**18)  # 32 MiB
        torch.ones(64 * 2**18)  # gone at once
        return torch.ones(16 * 2**18) + kept[: 16 * 2**18]  # 16 twice

    before = torch.ones(2**18)
    assert train_step.peak_memory("cpu", step) == pytest.approx(96 * 2**20, rel=0.01)
    assert before.sum() == 2**18


@pytest.mark.parametrize("lever", train_step.LEVERS)
def test_each_lever_of_the_reference_keeps_its_loss(lever, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "matmul_rate", lambda *_: 1e12)
    flags = ["--model", "tiny", "--weights", str(folder), "--image", "photo", "--num_crops", "6", "--device", "cpu"]
    flags += ["--steps", "1", "--reference"]
    expected = call(train_step, tmp_path / "a.json", *flags)
    result = call(train_step, tmp_path / "b.json", *flags, "--with", lever)
    assert result["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert result["kernel"] == ("sdpa" if lever == "sdpa" else "eager")


def figures(seconds: float, memory: float) -> dict:
    result = {"seconds": seconds, "memory_step": memory, "memory_peak": 2 * memory, "img_per_s": 1 / seconds}
    return result | {"mfu": 0.5, "split": {"vision": seconds}}


def test_levers_are_related_to_their_base_and_the_base_to_itself(folder, tmp_path, monkeypatch):
    cases = []

    def run_case(_folder, *flags):
        cases.append(flags)
        is_base = any(flags[len(flags) - len(group.base.flags) :] == tuple(group.base.flags) for group in bases)
        return {"cpu_seconds": 8 + 4 * (cases.count(flags) - 1), "memory_step": 100} if is_base else given

    given = {"cpu_seconds": 5, "memory_step": 50}
    bases = [group for group in levers.GROUPS if group.base.flags]
    monkeypatch.setattr(levers, "GROUPS", bases)
    monkeypatch.setattr(levers, "run_case", run_case)
    monkeypatch.setattr(levers, "count", lambda _: {"gb": 7})
    monkeypatch.setattr(levers, "layers_gb", dict)
    for flags in ([], ["--counts"]):  # which keeps the times
        result = call(levers, tmp_path / "a.json", "--weights", str(folder), *flags)["levers"]
        assert [entry["lever"] for entry in result if entry["lever"] == entry["base"]] == [g.base.what for g in bases]
        for entry in result:
            assert entry["gb"] == 7
            if entry["lever"] == entry["base"]:
                assert (entry["seconds"], entry["noise"]) == (10, 0.333)
            else:
                assert (entry["time"], entry["memory"]) == (0.5, 0.5)
                assert "kept" in entry["verdict"] or "product" in entry["lever"]


def test_levers_are_counted_in_full_size():
    found = {lever.what: lever.count for group in levers.GROUPS for lever in (group.base, *group.levers)}
    (peft, own) = (count() for what, count in found.items() if "PEFT" in what or "second product" in what)
    assert own.flops == peft.flops
    assert own.traffic < 0.7 * peft.traffic
    product, again = (count() for what, count in found.items() if what.startswith(("the product", "all layers")))
    # The official steps' own count, where nothing is recomputed: an attention kernel's backward pass takes a product more.
    assert product.flops == pytest.approx(
        train_step.step_flops(Phi3VConfig(), [2529], 17, 12, "full")["step"], rel=0.02
    )
    assert again.flops > 1.2 * product.flops


def test_the_gpu_run_outlives_its_cases_and_goes_on_where_it_was(tmp_path, monkeypatch):
    counter, flag, stale = tmp_path / "counter", tmp_path / "flag", tmp_path / "stale"
    stale.mkdir()
    count = f"open({str(counter)!r}, 'a').write('x')"
    dies = f"import os, time; there = os.path.exists({str(flag)!r}); open({str(flag)!r}, 'w'); there or time.sleep(60)"

    def find_cases(*_):
        return [
            gpu.Case("good", 60, ["-c", f"{count}; print('said')"], lambda: {"img_per_second": 2.0}),
            gpu.Case("fails", 60, ["-c", f"{count}; raise SystemExit(3)"], dict),
            gpu.Case("hangs", 2, ["-c", f"{count}; import time; time.sleep(60)"], dict),
            gpu.Case("killed", 60, ["-c", dies], lambda: {"losses": [1.0]}, killed_at=flag, fresh=stale),
        ]

    monkeypatch.setattr(gpu, "find_cases", find_cases)
    flags = [
        "--model",
        "tiny",
        "--device",
        "cpu",
        "--weights",
        str(tmp_path / "weights"),
        "--out",
        str(tmp_path / "out"),
    ]
    for runs in (3, 5):
        monkeypatch.setattr("sys.argv", ["benchmarks.gpu", *flags])
        gpu.main()
        # what is done is not done again
        assert len(counter.read_text()) == runs
        cases = json.loads((tmp_path / "out" / "gpu.json").read_text())["cases"]
        assert {name: case.get("error") for name, case in cases.items()} == {
            "good": None,
            "fails": "status 3",
            "hangs": "over its limit of 2 s",
            "killed": None,
        }
        assert cases["good"]["said"] == ["said"]
        assert cases["killed"]["losses"] == [1.0]
        assert not stale.exists()
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu", *flags, "--minutes", "0"])
    gpu.main()
    assert len(counter.read_text()) == 5


def test_the_cases_of_the_gpu_run_are_calls_that_the_parsers_know(tmp_path):
    cases = gpu.find_cases(tmp_path, tmp_path / "out", "cuda", "full")
    assert len({case.name for case in cases}) == len(cases)
    known = {option for action in _Parser(RecipeArguments)._actions for option in action.option_strings}
    for case in cases:
        if gpu.SCRIPT in case.command:
            given = case.command[case.command.index(gpu.SCRIPT) + 1 :]
            assert {word for word in given if word.startswith("--")} <= known


def test_the_checks_of_a_device_hold_on_a_cpu_and_find_a_wrong_kernel(monkeypatch):
    names = [name for name in gpu_checks.CHECKS if "official" not in name and "answers" not in name]
    assert [found for found in gpu_checks.run_checks("cpu", names) if not found["holds"]] == []

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        return torch.where(torch.arange(found.shape[-2])[:, None] == 20, torch.nan, found)

    right = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    assert not any(found["holds"] for found in gpu_checks.run_checks("cpu", names[:3]))


def test_train_step_reports_all_figures_and_compares(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_step, "matmul_rate", lambda *_: 1e12)
    flags = ["--model", "tiny", "--weights", str(folder), "--image", "meme", "--num_crops", "2", "--steps", "2"]
    flags += ["--device", "cpu"]
    result = call(train_step, tmp_path / "a.json", *flags, "--micro_batch", "2", "--padding_free")
    assert result["case"]["padding_free"] is True
    assert result["case"]["micro_batch"] == 2
    # One crop of 4 x 4 image tokens beside the global view, and some 40 of text.
    assert result["crops"] == 4
    parts = [seconds for name, seconds in result["split"].items() if name != "data"]
    assert result["seconds"] == pytest.approx(sum(parts), rel=0.3)
    assert result["img_per_s"] == pytest.approx(2 / result["seconds"], rel=0.05)
    assert result["mfu"] == pytest.approx(result["model_gflop"] / result["seconds"] / 1000, rel=0.05, abs=1e-4)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] == result["loss"]
    reference = call(train_step, tmp_path / "b.json", *flags, "--reference", "--compare", str(tmp_path / "a.json"))
    assert reference["kernel"] == "eager"
    ratios = json.loads(capsys.readouterr().out.splitlines()[-1].split("a.json ")[1])
    assert ratios["seconds"] == pytest.approx(reference["seconds"] / result["seconds"], rel=0.05)


def test_the_reference_runs_one_sample_a_step_only(tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(train_step, tmp_path / "a.json", "--reference", "--micro_batch", "2")
    assert "expected --micro_batch 1" in capsys.readouterr().err


def test_preprocess_counts_the_workers(tmp_path):
    cases = call(preprocess, tmp_path / "a.json", "--rounds", "1", "--img_per_s", "1000")["cases"]
    assert cases.keys() == {"page", "photo"}
    for case in cases.values():
        needed = 1000 * (case["seconds"] + case["decoding_seconds"])
        assert needed - 0.1 <= case["workers"] <= needed + 1.1
        assert case["ratio"] == pytest.approx(case["reference_seconds"] / case["seconds"], rel=0.05)


def test_evaluate_answers_with_both_batches(folder, tmp_path):
    flags = ["--weights", str(folder), "--device", "cpu", "--num_crops", "1", "--answers", "4", "--rounds", "1"]
    result = call(evaluate, tmp_path / "a.json", *flags, "--batch", "4", "--new_tokens", "3", "--images", "meme")
    case = result["cases"]["meme"]
    assert case["ratio"] == pytest.approx(case["batch_4_answers_per_s"] / case["batch_1_answers_per_s"], rel=0.05)


@pytest.mark.parametrize("lengths", ["even", "log"])
def test_epoch_sees_the_same_samples_both_ways(lengths, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(epoch, "LONGEST", 60)
    flags = ["--model", "tiny", "--weights", str(folder), "--device", "cpu", "--samples", "6", "--micro_batch", "3"]
    result = call(epoch, tmp_path / "a.json", *flags, "--lengths", lengths)
    found = epoch.spread(6, lengths)
    assert {min(found), max(found)} == {10, 60}
    assert result["tokens"] == sum(found)
    assert result["tokens_padded"] == 3 * (max(found[:3]) + max(found[3:]))
    assert result["ratio"] == pytest.approx(result["seconds"]["padding_free"] / result["seconds"]["padded"], rel=0.2)
