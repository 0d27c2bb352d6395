"""What is loaded and what is trained: full, frozen vision, LoRA, QLoRA; and what a broken model folder says."""

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import recipe
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Phi3Config
from transformers.modeling_layers import GradientCheckpointingLayer

from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import ConversationDataset
from finetuning.data.encoding import encode_conversation
from finetuning.errors import InputError
from finetuning.training.callbacks import GradientCheck, keep_text_activations
from finetuning.training.identity import read_run, write_run
from finetuning.training.loading import load_model, load_processor
from finetuning.training.summary import check_disk, describe, estimate_bytes, model_part, print_summary
from phi3v import Phi3VForCausalLM

own_process = pytest.fixture(autouse=True)(recipe.own_process)

FULL, FROZEN, LORA, QLORA = [], ["--freeze_vision_model"], ["--use_lora"], ["--use_qlora"]
LAST_CLIP_LAYER = re.compile(r"vision_model\.(encoder\.layers\.2\.|post_layernorm)")  # tiny.py's tower has 3 layers
# DESIGN.md: qkv_proj, o_proj, gate_up_proj, down_proj, lm_head; CLIP's q/k/v/out_proj, fc1, fc2; the projector.
LANGUAGE_LINEARS = {
    "lm_head",
    *(f"model.layers.{n}.self_attn.{name}" for n in (0, 1) for name in ("qkv_proj", "o_proj")),
    *(f"model.layers.{n}.mlp.{name}" for n in (0, 1) for name in ("gate_up_proj", "down_proj")),
}
VISION = "model.vision_embed_tokens."
VISION_LINEARS = {
    f"{VISION}img_projection.0",
    f"{VISION}img_projection.2",
    *(
        f"{VISION}img_processor.vision_model.encoder.layers.{n}.{name}"
        for n in (0, 1)
        for name in (
            *(f"self_attn.{which}" for which in ("q_proj", "k_proj", "v_proj", "out_proj")),
            "mlp.fc1",
            "mlp.fc2",
        )
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return recipe.model_folder(tmp_path_factory.mktemp("model") / "tiny")


def load(folder, *flags):
    args = recipe.arguments(folder, "--lora_rank", "4", *flags)
    return load_model(args), args


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted(model) -> set[str]:
    names = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    return {name.removeprefix("base_model.model.") for name in names}


def batch():
    samples = [
        Conversation("a", [Turn("What is it?", ["a cat"], [tiny.picture(60, 40)])]),
        Conversation("b", [Turn("q", ["a"])]),
    ]
    features = [encode_conversation(sample, tiny.processor(2)) for sample in samples]
    return collate(features)


def collate(features):
    found = DataCollatorForPhi3V(tiny.TOKENIZER.pad_token_id)(features)
    found.pop("ids")  # as `RecipeTrainer` gives it to the model
    return found


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model.train()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- what is trained


@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["fp32", "bf16"])
@pytest.mark.parametrize("flags", [FULL, FROZEN, LORA, QLORA, [*LORA, *FROZEN], [*QLORA, *FROZEN]], ids=" ".join)
def test_exactly_what_the_strategy_trains_is_trainable(folder, flags, precision):
    model, args = load(folder, *flags, *precision)
    every = {name for name, _ in model.named_parameters()}
    found = trainable(model)
    if args.use_lora:
        assert found == {name for name in every if "lora_" in name}
    elif args.freeze_vision_model:
        assert found == {name for name in every if not name.startswith(VISION)}
    else:
        assert found == {name for name in every if not LAST_CLIP_LAYER.search(name)}
    assert not any(LAST_CLIP_LAYER.search(name) for name in found)
    # and every one of them learns: none is without a gradient, or DDP would wait for it
    grads = gradients(model, batch())
    assert set(grads) == found
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("flags", [FULL, LORA, QLORA], ids=" ".join)
@pytest.mark.parametrize(("precision", "dtype"), [([], torch.float32), (["--bf16"], torch.bfloat16)])
def test_the_weights_are_in_the_dtype_of_the_run(folder, flags, precision, dtype):
    model, args = load(folder, *flags, *precision)
    assert args.compute_dtype == dtype
    for name, parameter in model.named_parameters():
        expected = torch.float32 if "lora_" in name else torch.uint8 if parameter.dtype == torch.uint8 else dtype
        assert parameter.dtype == expected, name


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_attention_kernel_is_the_one_asked_for(folder, kernel):
    model, args = load(folder, "--attn_implementation", kernel)
    assert model.config._attn_implementation == args.attention == kernel


@pytest.mark.parametrize("flags", [[], ["--use_lora"]], ids=["full", "lora"])
def test_the_language_model_alone_can_keep_its_activations(folder, flags):
    model, _ = load(folder, *flags)
    model.activation_checkpointing_enable()
    keep_text_activations(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}
    assert {model_part(name) for name in layers} == {"vision tower", "language model"}
    assert all(layer.gradient_checkpointing == (model_part(name) == "vision tower") for name, layer in layers.items())


@pytest.mark.parametrize("flags", [[], ["--torch_compile_backend", "eager"]], ids=["not asked for", "asked for"])
def test_the_layers_are_compiled_if_asked_for(folder, flags):
    model, args = load(folder, *flags)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers
    assert all((layer._compiled_call_impl is not None) == bool(flags) for layer in layers)
    assert ("layers compiled" in describe(model, args, dataset())) == bool(flags)


def test_loaded_weights_are_those_of_the_folder(folder):
    model, _ = load(folder)
    expected = load_file(folder / "model.safetensors")
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


# ---- LoRA


@pytest.mark.parametrize("flags", [LORA, QLORA], ids=" ".join)
def test_lora_adapts_the_published_layers(folder, flags):
    assert adapted(load(folder, *flags)[0]) == LANGUAGE_LINEARS | VISION_LINEARS
    assert adapted(load(folder, *flags, *FROZEN)[0]) == LANGUAGE_LINEARS


@pytest.mark.parametrize(("ratio", "alpha"), [("2", 8), ("0.5", 2), ("0.3", 1.2)])
def test_lora_settings(folder, ratio, alpha):
    model, _ = load(folder, *LORA, "--lora_alpha_ratio", ratio, "--lora_dropout", "0.25")
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, alpha, 0.25)
    assert config.init_lora_weights == "gaussian"


def test_lora_begins_as_the_base_model_with_gaussian_matrices(folder):
    model, _ = load(folder, *LORA)
    matrices = defaultdict(list)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            matrices["A" if "lora_A" in name else "B"].append(parameter.detach().flatten())
    values = {which: torch.cat(parts) for which, parts in matrices.items()}
    assert not values["B"].any()
    # PEFT's gaussian has a standard deviation of 1 / rank; kaiming, its default, would be uniform
    assert values["A"].std().item() == pytest.approx(1 / 4, rel=0.05)
    assert values["A"].pow(4).mean() / values["A"].var() ** 2 == pytest.approx(3, rel=0.15)
    inputs = batch()
    expected = Phi3VForCausalLM.from_pretrained(folder)(**inputs).loss
    assert torch.allclose(model.eval()(**inputs).loss, expected, atol=1e-6)


def test_the_first_adapter_follows_from_the_seed(folder):
    # Whatever drew random numbers before; otherwise no two runs are alike, nor two ways to split one into ranks.
    def first(seed: int) -> torch.Tensor:
        torch.rand(1)
        model, _ = load(folder, *LORA, "--seed", str(seed))
        return model.get_parameter("base_model.model.lm_head.lora_A.default.weight").detach()

    assert torch.equal(first(seed=1), first(seed=1))
    assert not torch.equal(first(seed=1), first(seed=2))


@pytest.mark.parametrize("flags", [LORA, QLORA, [*LORA, *FROZEN]], ids=" ".join)
def test_an_adapter_file_holds_the_adapter_only(folder, flags, tmp_path):
    model, _ = load(folder, *flags)
    model.save_pretrained(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    assert keys
    assert all(".lora_" in key for key in keys)
    assert len(keys) == 2 * len(adapted(model))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


# ---- QLoRA


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """bitsandbytes' kernels for answering on the CPU want widths like those of a real model, multiples of 128 or so."""
    return recipe.model_folder(
        tmp_path_factory.mktemp("model") / "large", hidden_size=256, intermediate_size=512, num_attention_heads=2,
        num_key_value_heads=2,
        rope_scaling={"type": "su", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64},
    )  # fmt: skip


@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["fp32", "bf16"])
def test_qlora_quantises_the_linear_layers_of_the_language_model_only(folder, precision):
    model, _ = load(folder, *QLORA, *precision)
    bits = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer.weight")
        for name, parameter in model.named_parameters()
        if parameter.dtype == torch.uint8
    }
    assert bits == LANGUAGE_LINEARS - {"lm_head"}
    quantised = model.base_model.model.model.layers[0].mlp.down_proj.base_layer
    assert quantised.weight.quant_state.quant_type == "nf4"
    assert quantised.weight.quant_state.nested


@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["fp32", "bf16"])
def test_qlora_gradients_are_the_same_after_answering(large_folder, precision):
    # bitsandbytes repacks the weights for inference on CPUs with AVX512 when the model answers first; the packed
    # product has no backward pass, and the evaluation before training would silently have stopped the learning.
    model, args = load(large_folder, *QLORA, *precision)
    # The matrices B begin as 0, and so would the gradients of A.
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    inputs = batch()

    def measure():
        with torch.autocast("cpu", dtype=args.compute_dtype, enabled=bool(precision)):
            return gradients(model, inputs)

    before = measure()
    prompt = tiny.processor(2)("<|user|>\nq<|end|>\n<|assistant|>\n")
    with torch.no_grad(), torch.autocast("cpu", dtype=args.compute_dtype, enabled=bool(precision)):
        model.eval()
        model.generate(**prompt, max_new_tokens=4)
    after = measure()
    assert before.keys() == after.keys()
    assert len(before) == 2 * len(adapted(model))
    for name in before:
        assert before[name].any(), name
        assert torch.equal(before[name], after[name]), name


# ---- describe


def table(text: str) -> dict[str, list[str]]:
    lines = text.splitlines()[1:]
    rows = lines[: next(number for number, line in enumerate(lines) if line.startswith("all")) + 1]
    return {line[:16].strip(): line[16:].split() for line in rows}


def dataset(rows: int = 10) -> ConversationDataset:
    return ConversationDataset(list(range(rows)), lambda _: None, tiny.processor(2), [10] * rows)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (FULL, "strategy         full; DeepSpeed,"),
        (FROZEN, "strategy         full with frozen vision; DeepSpeed,"),
        (LORA, "strategy         LoRA; one process"),
        ([*QLORA, *FROZEN], "strategy         QLoRA with frozen vision; one process"),
    ],
    ids=["full", "frozen", "lora", "qlora frozen"],
)
def test_the_description_counts_what_is_trained(folder, flags, line):
    model, args = load(folder, "--batch_size", "4", "--batch_size_per_gpu", "2", "--num_train_epochs", "2", *flags)
    text = describe(model, args, dataset())
    assert line in text
    assert "effective batch  4 = 1 rank(s) x 2 micro-batch x 2 accumulation" in text
    assert "compute float32; attention sdpa" in text
    # 10 rows: 3 steps an epoch, 50 of warm-up by default
    assert re.search(r"^steps +6, 3 an epoch; its last step has 2 sample\(s\)$", text, re.MULTILINE)
    assert re.search(r"^warning +all 6 steps are warm-up \(--warmup_steps 50\)", text, re.MULTILINE)
    assert "rows             10, each once an epoch" in text
    counts = table(text)
    reference = Phi3VForCausalLM.from_pretrained(folder)
    expected = defaultdict(lambda: [0, 0])
    for name, parameter in reference.named_parameters():
        fixed = args.use_lora or LAST_CLIP_LAYER.search(name) or (args.freeze_vision_model and VISION in name)
        expected[model_part(name)][1 if fixed else 0] += parameter.numel()
    lora = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    if lora:
        expected["adapters"] = [lora, 0]
    assert counts.keys() == {*expected, "all"}
    for part, numbers in expected.items():
        assert [int(number.replace(",", "")) for number in counts[part][:2]] == numbers, part
    totals = [sum(numbers[index] for numbers in expected.values()) for index in (0, 1)]
    assert [int(number.replace(",", "")) for number in counts["all"][:2]] == totals
    assert ("nf4" in text) == bool(args.use_qlora)


@pytest.mark.parametrize(
    ("rows", "flags", "said"),
    [
        (12, [], "3, 3 an epoch; warm-up over the first 1"),
        (10, [], "3, 3 an epoch; its last step has 2 sample(s); warm-up over the first 1"),
        (
            10,
            ["--dataloader_drop_last"],
            "2, 2 an epoch; its last step is left out (2 samples); warm-up over the first 1",
        ),
        (10, ["--num_train_epochs", "1.5"], "5, 3 an epoch; its last step has 2 sample(s); warm-up over the first 1"),
        (10, ["--max_steps", "7"], "7, 3 an epoch; its last step has 2 sample(s); warm-up over the first 1"),
        (1, ["--max_steps", "1"], "1, 1 an epoch; its last step has 1 sample(s); warm-up over the first 1"),
    ],
)
def test_the_description_counts_steps(folder, rows, flags, said):
    model, args = load(folder, *LORA, "--batch_size", "4", "--warmup_steps", "1", *flags)
    assert f"steps            {said}\n" in describe(model, args, dataset(rows))


def test_places_that_stay_empty_are_said(folder):
    model, args = load(folder, *LORA, "--batch_size", "4", "--batch_size_per_gpu", "3")
    assert "effective batch  4 = 1 rank(s) x 3 micro-batch x 2 accumulation; 2 of 6 places stay empty" in describe(
        model, args, dataset()
    )


def usage(free: int):
    return lambda _: SimpleNamespace(free=free)


@pytest.mark.parametrize("flags", [[*FULL, "--deepspeed", "none"], LORA], ids=["full", "lora"])
def test_free_disk_space_is_held_against_what_is_written(folder, flags, monkeypatch, capsys):
    model, args = load(folder, *flags, "--batch_size", "1", "--save_steps", "2")
    weights, checkpoint = estimate_bytes(model, args)
    needed, least = weights + 3 * checkpoint, weights + checkpoint
    for free, outcome in (
        (needed, "nothing"),
        (needed - 1, "a warning"),
        (least, "a warning"),
        (least - 1, "an error"),
    ):
        monkeypatch.setattr("finetuning.training.summary.shutil.disk_usage", usage(free))
        if outcome == "an error":
            with pytest.raises(InputError, match=r"--output_dir output: expected .* of free disk space"):
                check_disk(model, args, dataset())
            continue
        check_disk(model, args, dataset())
        assert (capsys.readouterr().out.startswith("warning          output: ")) == (outcome == "a warning")


def test_the_sizes_are_those_of_the_files(folder, tmp_path):
    for flags in ([*FULL, "--deepspeed", "none"], LORA):
        model, args = load(folder, *flags)
        weights, checkpoint = estimate_bytes(model, args)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.save_pretrained(tmp_path / "saved")
        found = sum(path.stat().st_size for path in (tmp_path / "saved").glob("*.safetensors"))
        # but for the names, some 100 bytes a tensor
        assert weights == pytest.approx(found, abs=15_000)
        assert checkpoint - weights == 8 * sum(parameter.numel() for parameter in trained)
        shutil.rmtree(tmp_path / "saved")


def test_the_summary_is_kept_for_the_report(folder, capsys):
    model, args = load(folder, *LORA)
    Path("output").mkdir(exist_ok=True)
    write_run(Path("output"), {"script": "x.py", "settings": {}, "spread": {}, "rows": {}, "started": ""})
    print_summary(model, args, dataset())
    text = describe(model, args, dataset())
    assert capsys.readouterr().out.startswith(text)
    assert read_run(Path("output"))["summary"] == text
    assert read_run(Path("output"))["script"] == "x.py"


def test_the_parts_of_the_official_names():
    assert (
        model_part("model.vision_embed_tokens.img_processor.vision_model.embeddings.class_embedding") == "vision tower"
    )
    assert model_part("model.vision_embed_tokens.glb_GN") == "projector"
    assert model_part("model.vision_embed_tokens.img_projection.0.weight") == "projector"
    assert model_part("model.layers.0.mlp.down_proj.weight") == "language model"
    assert model_part("lm_head.weight") == "language model"
    assert model_part("base_model.model.lm_head.lora_A.default.weight") == "adapters"


# ---- gradients of the first step


def end_of_first_step(check: GradientCheck):
    args = SimpleNamespace(device=torch.device("cpu"))
    check.on_step_end(args, SimpleNamespace(is_world_process_zero=True), None)


def test_a_run_in_which_every_part_learns_passes(folder, capsys):
    model, _ = load(folder)
    check = GradientCheck(model)
    gradients(model, batch())
    end_of_first_step(check)
    assert capsys.readouterr().out == ""


def test_a_part_cut_off_from_the_loss_stops_the_run(folder):
    model, _ = load(folder)
    check = GradientCheck(model)
    projection = model.model.vision_embed_tokens.forward
    model.model.vision_embed_tokens.forward = lambda *args: projection(*args).detach()
    gradients(model, batch())
    with pytest.raises(RuntimeError, match="projector: expected gradients in the first step"):
        end_of_first_step(check)


def test_a_part_whose_gradients_are_all_zero_is_named(folder, capsys):
    # Text-only samples: the vision parameters take part with gradient 0.
    model, _ = load(folder)
    check = GradientCheck(model)
    features = encode_conversation(Conversation("b", [Turn("q", ["a"])]), tiny.processor(2))
    gradients(model, collate([features]))
    end_of_first_step(check)
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"warning: (.*): all gradients of the first step are 0", line)[1] for line in lines] == [
        "projector",
        "vision tower",
    ]


def test_the_check_costs_nothing_after_the_first_step(folder):
    model, _ = load(folder)
    check = GradientCheck(model)
    gradients(model, batch())
    end_of_first_step(check)
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    end_of_first_step(check)


# ---- broken model folders


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(function, folder) -> str:
    with pytest.raises(InputError) as caught:
        function(recipe.arguments(folder))
    message = str(caught.value)
    assert str(folder) in message
    assert len(message.splitlines()) == 1
    return message


def sharded(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_a_sharded_folder_loads(copy):
    sharded(copy)
    assert load_model(recipe.arguments(copy))


def test_a_missing_shard_is_named(copy):
    sharded(copy)
    (copy / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(load_model, copy)


def test_missing_weights_are_counted_and_the_first_is_named(copy):
    tensors = load_file(copy / "model.safetensors")
    for name in ("model.norm.weight", "lm_head.weight"):
        del tensors[name]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    message = refusal(load_model, copy)
    assert "2 more weights" in message
    assert "lm_head.weight" in message


def test_no_weights_at_all(copy):
    (copy / "model.safetensors").unlink()
    assert "weights" in refusal(load_model, copy)


def test_a_truncated_file_of_weights(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refusal(load_model, copy)


def test_weights_of_another_shape(copy):
    edit_json(copy / "config.json", intermediate_size=128)
    assert "_proj.weight" in refusal(load_model, copy)


@pytest.mark.parametrize("function", [load_processor, load_model])
def test_a_config_that_is_no_json(copy, function):
    (copy / "config.json").write_text("{")
    refusal(function, copy)


def test_another_model(copy):
    Phi3Config().save_pretrained(copy)
    message = refusal(load_processor, copy)
    assert "expected a Phi-3-vision model" in message
    assert "'phi3'" in message


def test_an_unknown_model(copy):
    edit_json(copy / "config.json", model_type="phi99")
    assert "phi99" in refusal(load_processor, copy)


def test_a_folder_without_processor(copy):
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    refusal(load_processor, copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
def test_a_processor_file_that_is_no_json(copy, name):
    (copy / name).write_text("{")
    refusal(load_processor, copy)


def test_a_processor_of_another_crop_size(copy):
    processor = tiny.processor()
    processor.image_processor.crop_size = 56
    processor.save_pretrained(copy)
    message = refusal(load_processor, copy)
    assert "crop_size 56" in message
    assert "image_size 28" in message


def test_the_processor_takes_num_crops_and_the_longest_sample_of_the_model(folder):
    args = recipe.arguments(folder, "--num_crops", "3")
    assert load_processor(args).image_processor.num_crops == 3
    assert args.max_length == 32 * tiny.LONG_AFTER
    args = recipe.arguments(folder, "--max_length", "100")
    load_processor(args)
    assert args.max_length == 100
    with pytest.raises(InputError, match=r"--max_length 4000: expected at most 2048 tokens"):
        load_processor(recipe.arguments(folder, "--max_length", "4000"))


def test_a_module_that_is_no_part_of_the_model_is_no_fault():
    # GradientCheck on anything with parameters, as a user's own model may be
    model = nn.Linear(2, 2)
    check = GradientCheck(model)
    model(torch.ones(1, 2)).sum().backward()
    end_of_first_step(check)
