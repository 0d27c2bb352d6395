"""The DocVQA script end to end, under torchrun on two processes: four strategies, resuming, splits of the batch, bad calls."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import recipe
import torch
from launch import Run, torchrun
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, BitsAndBytesConfig

from finetuning.metrics import anls
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
    """`trained("full")`: the run of a strategy on two processes, made when it is first asked for."""
    runs = {}

    def run(strategy: str) -> Run:
        if strategy not in runs:
            runs[strategy] = torchrun(folder / strategy, *flags, *STRATEGIES[strategy])
            assert runs[strategy].status == 0, runs[strategy].stderr
        return runs[strategy]

    return run


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
    quantization = None
    if strategy == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["model.vision_embed_tokens", "lm_head"],
        )
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


@pytest.mark.parametrize("strategy", ["full"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(trained, folder, flags, strategy):
    # As a run that stopped after step 3, in the middle of an epoch, has left its folder.
    whole = trained(strategy)
    output = folder / f"{strategy}-resumed"
    output.mkdir()
    shutil.copytree(whole.output / "checkpoint-2", output / "checkpoint-2")
    for name in ("eval_before.json", "predictions.jsonl"):
        shutil.copy(whole.output / name, output / name)
    resumed = torchrun(output, *flags, *STRATEGIES[strategy], "--resume_from_checkpoint")
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
