"""How the tests call the scripts for TRL, and what they ask of a result: it is merged, asked and loaded like any other."""

import json
import sys
from pathlib import Path

import recipe
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file

from finetuning import ask, merge
from phi3v import Phi3VForCausalLM, Phi3VProcessor

ROOT = Path(__file__).parents[2]
# On a CPU TRL's default of bf16 would only be slower.
FLAGS = ("--num_crops", "2", "--bf16", "False", "--lora_rank", "8", "--logging_steps", "1", "--disable_tqdm", "True")


def run(monkeypatch, script, folder: Path, data: Path, output: Path, *flags: str) -> Path:
    """Runs a script's main() in this process; its output folder."""
    paths = ["--model_name_or_path", str(folder), "--data_dir", str(data), "--output_dir", str(output)]
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *paths, *FLAGS, *flags])
    script.main()
    return output


def figures(output: Path, stage: str) -> dict[str, float]:
    return json.loads((output / f"eval_{stage}.json").read_text())


def history(output: Path) -> list[dict]:
    """What was logged at each training step, times left out."""
    entries = json.loads((output / "trainer_state.json").read_text())["log_history"]
    timed = ("step_time", "num_tokens")
    return [{key: entry[key] for key in entry if key not in timed} for entry in entries if "grad_norm" in entry]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


@torch.no_grad()
def logits(model, processor) -> torch.Tensor:
    return model.eval()(
        **processor("<|user|>\n<|image_1|>\nWhat?<|end|>\n<|assistant|>\n", [tiny.picture(90, 50)])
    ).logits


def check_result(monkeypatch, capsys, base: Path, output: Path, tmp_path: Path) -> None:
    """Merges a result, asks it, and loads it by PEFT: all say the same, and not what the base says."""
    processor = Phi3VProcessor.from_pretrained(output)
    assert processor.image_processor.num_crops == 2
    found = logits(PeftModel.from_pretrained(Phi3VForCausalLM.from_pretrained(base), str(output)), processor)
    assert (logits(Phi3VForCausalLM.from_pretrained(base), processor) - found).abs().max() > 0.01
    monkeypatch.setattr(sys, "argv", ["merge.py", str(output), str(tmp_path / "merged")])
    merge.main()
    assert "3 of 3 answers the same\n" in capsys.readouterr().out
    assert (logits(Phi3VForCausalLM.from_pretrained(tmp_path / "merged"), processor) - found).abs().max() < 1e-4
    assert load_file(tmp_path / "merged/model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    recipe.page("3").save(tmp_path / "page.png")
    answers = []
    for folder in (output, tmp_path / "merged"):
        monkeypatch.setattr(
            sys,
            "argv",
            ["ask.py", str(folder), "--image", str(tmp_path / "page.png"), "--max_new_tokens", "6", "Which?"],
        )
        ask.main()
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""
