"""finetune_trl_dpo.py: TRL's DPOTrainer with the native model (`make test-trl`)."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is installed by make test-trl, in an environment of its own")

import launch
import recipe
import tiny
import torch
import trl_runs
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

import finetune_trl_dpo
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.encoding import encode_conversation
from finetuning.errors import InputError
from phi3v import Phi3VForCausalLM, Phi3VProcessor

own_process = pytest.fixture(autouse=True)(recipe.own_process)

TRAIN = ("--max_steps", "8", "--learning_rate", "1e-2", "--per_device_train_batch_size", "4", "--save_steps", "4")


def preferences(folder: Path, counts: dict[str, int]) -> Path:
    """Rows that prefer a short answer to a sentence, about no, one or two pictures of several sizes."""
    (folder / "images").mkdir(parents=True)
    number = 0
    for split, count in counts.items():
        rows = []
        for _ in range(count):
            names = [f"images/{number}-{index}.png" for index in range(number % 3)]
            for index, name in enumerate(names):
                recipe.page(str(number), [(60, 40), (28, 60), (30, 30)][(number + index) % 3]).save(folder / name)
            texts = {
                "prompt": f"Page {number}?",
                "chosen": f"no. {number}",
                "rejected": f"It is the page {number}, I think.",
            }
            rows.append({"id": f"p{number}", "images": names, **texts})
            number += 1
        recipe.write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipe.model_folder(tmp_path_factory.mktemp("dpo") / "base")


@pytest.fixture
def data(tmp_path):
    return preferences(tmp_path / "data", {"train": 24, "test": 6})


def test_the_margin_rises_on_rows_held_back_and_a_resumed_run_ends_the_same(base, data, tmp_path, monkeypatch, capsys):
    output = trl_runs.run(monkeypatch, finetune_trl_dpo, base, data, tmp_path / "run", *TRAIN)
    before, after = (trl_runs.figures(output, stage) for stage in ("before", "after"))
    assert before["rewards/margins"] == 0
    assert after["rewards/margins"] > 0.5
    assert after["rewards/accuracies"] == 1
    assert "after training: " in capsys.readouterr().out

    # Killed after its first checkpoint: all else is gone.
    checkpoint, undisturbed = output / "checkpoint-4", trl_runs.weights(output)
    resumed = trl_runs.run(
        monkeypatch,
        finetune_trl_dpo,
        base,
        data,
        tmp_path / "resumed",
        *TRAIN,
        "--resume_from_checkpoint",
        str(checkpoint),
    )
    trl_runs.assert_equal(trl_runs.weights(resumed), undisturbed)
    assert trl_runs.history(resumed)[-4:] == trl_runs.history(output)[-4:]
    assert trl_runs.figures(resumed, "after")["rewards/margins"] == after["rewards/margins"]
    trl_runs.check_result(monkeypatch, capsys, base, output, tmp_path)
    with pytest.raises(
        InputError, match="expected a folder without a run, found one; --resume_from_checkpoint True goes on"
    ):
        trl_runs.run(monkeypatch, finetune_trl_dpo, base, data, output, *TRAIN)


@torch.no_grad()
def log_probability(model, processor, row: dict, answer: str) -> float:
    """Of what the recipes train in one conversation by itself, in nats."""
    images = [tiny.Image.open(path) for path in row["images"]]
    features = encode_conversation(Conversation("x", [Turn(row["prompt"], [answer], images)]), processor)
    inputs = {"input_ids": torch.tensor([features["input_ids"]])}
    inputs |= {name: features[name] for name in ("pixel_values", "image_sizes") if name in features}
    labels = torch.tensor(features["labels"][1:])
    found = model(**inputs).logits[0, :-1].log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return float(found[labels >= 0].sum())


def test_a_batch_of_rows_without_and_with_several_pictures_is_scored_as_each_by_itself(
    base, data, tmp_path, monkeypatch
):
    flags = ("--max_steps", "1", "--learning_rate", "0", "--save_strategy", "no", "--per_device_eval_batch_size", "6")
    output = trl_runs.run(monkeypatch, finetune_trl_dpo, base, data, tmp_path / "run", *flags)
    model = Phi3VForCausalLM.from_pretrained(base).eval()
    processor = Phi3VProcessor.from_pretrained(base, num_crops=2)
    rows = finetune_trl_dpo.load_folder(
        type("Args", (), {"data_dir": str(data), "eval_split": None, "do_train": True}), ("test",)
    )[1]
    for which in ("chosen", "rejected"):
        expected = sum(log_probability(model, processor, row, row[which]) for row in rows) / len(rows)
        assert trl_runs.figures(output, "before")[f"logps/{which}"] == pytest.approx(expected, rel=1e-4)


def test_trls_own_collator_would_begin_each_answer_with_a_bos(base):
    processor = Phi3VProcessor.from_pretrained(base, num_crops=2)
    texts = {"prompt": ("user", "Same?"), "chosen": ("assistant", "No."), "rejected": ("assistant", "Yes.")}
    example = {name: [{"role": role, "content": text}] for name, (role, text) in texts.items()}
    example["images"] = [tiny.picture(60, 20), tiny.picture(20, 20)]
    batch = DataCollatorForVisionPreference(processor)([example])
    assert len(batch["image_sizes"]) == 4  # several pictures it takes
    for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True):
        assert ids[mask == 1][0] == processor.tokenizer.bos_token_id


def test_two_processes_train_as_one_does(base, data, tmp_path, monkeypatch):
    one = trl_runs.run(monkeypatch, finetune_trl_dpo, base, data, tmp_path / "one", *TRAIN, "--max_steps", "3")
    paths = ("--model_name_or_path", str(base), "--data_dir", str(data))
    flags = (*trl_runs.FLAGS, *TRAIN, "--max_steps", "3", "--per_device_train_batch_size", "2")
    two = launch.torchrun(tmp_path / "two", *paths, *flags, task=trl_runs.ROOT / "finetune_trl_dpo.py")
    assert two.status == 0, two.stderr
    for found, expected in zip(trl_runs.history(two.output), trl_runs.history(one), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    margins = [trl_runs.figures(output, "after")["rewards/margins"] for output in (two.output, one)]
    assert margins[0] == pytest.approx(margins[1], rel=1e-2)


def test_bad_rows_and_flags_are_told_in_one_line_before_a_model_is_loaded(base, data, tmp_path, monkeypatch):
    (base / "model.safetensors").rename(tmp_path / "weights")  # not even there
    lines = {}
    try:
        rows = (data / "test.jsonl").read_text()
        for name, row in {
            "same": '{"id": 1, "prompt": "?", "chosen": "A", "rejected": "A"}',
            "field": '{"id": 1}',
        }.items():
            (data / "test.jsonl").write_text(rows + row + "\n")
            with pytest.raises(InputError) as caught:
                trl_runs.run(monkeypatch, finetune_trl_dpo, base, data, tmp_path / "run")
            lines[name] = str(caught.value)
        for flags in (
            ("--lerning_rate", "1"),
            ("--beta", "much"),
            ("--loss_type", "sigmoid", "hinge", "--loss_weights", "1"),
            ("--resume_from_checkpoint", "True"),
            ("--lora_rank", "0"),
        ):
            with pytest.raises(InputError) as caught:
                trl_runs.run(monkeypatch, finetune_trl_dpo, base, data, tmp_path / "run", *flags)
            lines[flags[0]] = str(caught.value)
    finally:
        (tmp_path / "weights").rename(base / "model.safetensors")
    assert all(line.isprintable() for line in lines.values()), lines
    place = f"{data}/test.jsonl:7: sample 1: "
    assert lines["same"] == f"{place}rejected: expected another answer than chosen, found the same, 'A'"
    assert lines["field"].startswith(f"{place}expected the fields prompt, chosen, rejected; or image, question, ")
    assert "--lerning_rate" in lines["--lerning_rate"]
    assert lines["--beta"] == "argument --beta: invalid float value: 'much' (--help lists all flags)"
    assert "`loss_weights` must have the same length" in lines["--loss_type"]
    assert "expected a checkpoint-N in" in lines["--resume_from_checkpoint"]
    assert lines["--lora_rank"] == "--lora_rank 0: expected a whole number from 1 to 3072"


def test_help_lists_trls_flags_and_ours(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune_trl_dpo.py", "--help"])
    with pytest.raises(SystemExit):
        finetune_trl_dpo.main()
    found = capsys.readouterr().out
    assert "--beta" in found
    assert "--lora_alpha_ratio" in found
    assert "--task" not in found
