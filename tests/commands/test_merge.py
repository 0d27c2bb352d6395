"""`python -m finetuning.merge`: the merged model says what base and adapter say, and stands in a whole folder."""

import json
from pathlib import Path

import pytest
import recipe
import saved
import tiny
import torch
from huggingface_hub import ModelCard

from finetuning import merge
from finetuning.errors import RunError
from finetuning.training.loading import open_model, read_processor
from finetuning.training.saved import find_saved

own_process = pytest.fixture(autouse=True)(recipe.own_process)


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    found = find_saved(str(folder))
    model, processor = open_model(found, dtype, False, torch.device("cpu")), read_processor(found)
    inputs = processor("<|user|>\n<|image_1|>\nWhat is it?<|end|>\n<|assistant|>\n", [tiny.picture(90, 50)])
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipe.model_folder(tmp_path_factory.mktemp("merge") / "base")


@pytest.mark.parametrize("flags", [[], ["--freeze_vision_model"]])
def test_a_merged_model_says_what_the_adapter_says(flags, base, tmp_path, monkeypatch, capsys):
    adapter = saved.adapter_folder(base, tmp_path / "adapter", *flags)
    saved.call(monkeypatch, merge, adapter, tmp_path / "merged")
    expected = logits(adapter)
    assert (logits(base) - expected).abs().max() > 0.1
    assert (logits(tmp_path / "merged") - expected).abs().max() < 1e-4
    assert not (tmp_path / "merged.part").exists()
    assert "3 of 3 answers the same\n" in capsys.readouterr().out
    # a whole folder, that trains on
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= names
    assert not names & {"adapter_config.json", "adapter_model.safetensors"}
    found = ModelCard.load(tmp_path / "merged/README.md")
    assert (found.data.base_model_relation, found.data.library_name) == ("finetune", "transformers")
    assert "# merged\n" in found.text
    assert "Merged from the adapter adapter; weights in float32." in found.text
    assert str(tmp_path) not in found.content


def test_weights_are_rounded_once(tmp_path, monkeypatch):
    """In bfloat16 the merged weights are those of the exact sum, rounded, and not of a rounded sum of rounded parts."""
    half = recipe.model_folder(tmp_path / "half", torch.bfloat16)
    adapter = saved.adapter_folder(half, tmp_path / "adapter", "--bf16")
    saved.call(monkeypatch, merge, adapter, tmp_path / "merged")
    exact = merge.merge(find_saved(str(adapter)), torch.float32).state_dict()
    found = open_model(find_saved(str(tmp_path / "merged")), torch.bfloat16, False, torch.device("cpu")).state_dict()
    for name, weight in found.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, exact[name].bfloat16()), name


def test_the_dtype_is_chosen(base, tmp_path, monkeypatch):
    adapter = saved.adapter_folder(base, tmp_path / "adapter")
    saved.call(monkeypatch, merge, adapter, tmp_path / "merged", "--dtype", "bf16")
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    # the base's float32 weights are not rounded before the adapter is added
    exact = merge.merge(find_saved(str(adapter)), torch.float32).state_dict()
    found = open_model(find_saved(str(tmp_path / "merged")), torch.bfloat16, False, torch.device("cpu")).state_dict()
    assert all(torch.equal(weight, exact[name].bfloat16()) for name, weight in found.items())


def test_a_merge_that_added_nothing_is_refused_in_16_bits_too(tmp_path, monkeypatch):
    """What the adapter has learnt is less than the rounding that is allowed for."""
    half = recipe.model_folder(tmp_path / "half", torch.bfloat16)
    adapter = saved.adapter_folder(half, tmp_path / "adapter", "--bf16", scale=0.01)
    monkeypatch.setattr(merge.BaseTunerLayer, "merge", lambda *_, **__: None, raising=False)
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.merge", lambda *_, **__: None)
    with pytest.raises(RunError, match="expected the merged model to say what the adapter says"):
        saved.call(monkeypatch, merge, adapter, tmp_path / "merged")


def test_a_wrong_merge_is_not_given_its_name(base, tmp_path, monkeypatch):
    adapter = saved.adapter_folder(base, tmp_path / "adapter")
    right = merge.merge

    def wrong(*args):
        model = right(*args)
        model.model.layers[1].mlp.down_proj.weight.data *= 1.02
        return model

    monkeypatch.setattr(merge, "merge", wrong)
    with pytest.raises(RunError, match="expected the merged model to say what the adapter says"):
        saved.call(monkeypatch, merge, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_qlora_adapter_is_held_against_both_bases(base, tmp_path, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    adapter = saved.adapter_folder(base, tmp_path / "adapter")
    run = {"script": "s", "started": "", "spread": {}, "rows": {}, "settings": {"use_qlora": True}}
    (adapter / "run.json").write_text(json.dumps(run))
    saved.call(monkeypatch, merge, adapter, tmp_path / "merged")
    printed = capsys.readouterr().out
    assert "3 of 3 answers the same" in printed
    assert "trained over the base in 4 bits; against that: largest logit deviation" in printed
    assert (logits(tmp_path / "merged") - logits(adapter)).abs().max() < 1e-4


def test_a_bad_call_gets_one_line(base, tmp_path, monkeypatch):
    adapter = saved.adapter_folder(base, tmp_path / "adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    calls = {
        "whole model": ([base, tmp_path / "to"], "expected an adapter, found a whole model"),
        "no such adapter": ([tmp_path / "gone", tmp_path / "to"], "no such folder"),
        "to is there": ([adapter, tmp_path / "full"], "expected a new folder for the merged model, found something"),
        "to is a file": ([adapter, tmp_path / "full/file"], "expected a new folder for the merged model"),
        "onto itself": ([adapter, adapter], "expected a new folder for the merged model"),
        "dtype": ([adapter, tmp_path / "to", "--dtype", "int8"], "--dtype"),
        "no weights": (
            [tmp_path / "cut", tmp_path / "to"],
            "adapter_model.safetensors: expected this file, found none",
        ),
        "nothing": ([], "adapter, to"),
    }
    for name, (argv, says) in calls.items():
        assert says in saved.refusal(monkeypatch, merge, *argv), name
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    assert "GB of free disk space" in saved.refusal(monkeypatch, merge, adapter, tmp_path / "to")
