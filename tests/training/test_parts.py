"""Any part of the model frozen, full or lora: what is trained, in which dtype, at which rate, saved, loaded and merged."""

import copy

import pytest
import recipe
import saved as commands
import tiny
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from finetuning import merge
from finetuning.arguments import PARTS
from finetuning.errors import InputError
from finetuning.training import fitting
from finetuning.training.fake_step import FakeModel
from finetuning.training.loading import load_model, load_processor, open_model
from finetuning.training.lora import OneProduct
from finetuning.training.memory import Activations, count_parameters
from finetuning.training.parts import STRATEGIES, Choices, choices_named, choices_of, part_below
from finetuning.training.rates import group_by_rate, lora_plus_optimizer
from finetuning.training.saved import find_saved
from finetuning.training.trainer import RecipeTrainer
from phi3v import Phi3VForCausalLM

own_process = pytest.fixture(autouse=True)(recipe.own_process)


def named(vision: str, projector: str, language: str) -> list[str]:
    return ["--vision", vision, "--projector", projector, "--language", language]


# The five, and one of each other kind.
COMBINATIONS = {
    "vision and projector full, language LoRA": named("full", "full", "lora"),
    "projector only": named("frozen", "full", "frozen"),
    "language frozen": named("full", "full", "frozen"),
    "vision LoRA only": named("lora", "frozen", "frozen"),
    "QLoRA, projector full": [*named("frozen", "full", "lora"), "--use_qlora"],
    "language full, vision LoRA": named("lora", "lora", "full"),
    "vision only": named("full", "frozen", "frozen"),
    "projector full, the others LoRA": named("lora", "full", "lora"),
}
WITH_LORA = {name: flags for name, flags in COMBINATIONS.items() if "lora" in flags}
VISION = "vision_embed_tokens"
NEVER_RUN = ("encoder.layers.2.", "post_layernorm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return recipe.model_folder(tmp_path_factory.mktemp("model") / "tiny")


def arguments(folder, *flags):
    return recipe.arguments(folder, "--lora_rank", "4", *flags)


def inputs(text: bool = False) -> dict[str, torch.Tensor]:
    prompt = (
        "<|user|>\nHello<|end|>\n" if text else "<|user|>\n<|image_1|>\nWhat is it?<|end|>\n<|assistant|>\nA cat<|end|>"
    )
    return dict(tiny.processor(2)(prompt, None if text else [tiny.picture(90, 50)]))


def train(model, steps: int = 3, dtype: torch.dtype = torch.float32, rate: float = 0.05):
    """A few steps, as the Trainer's under autocast."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(steps):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**inputs(), labels=inputs()["input_ids"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def near(found: torch.Tensor, expected: torch.Tensor, share: float) -> bool:
    """Whether the mean deviation (root of squares) is below that share of the spread."""
    return bool((found - expected).float().square().mean().sqrt() < share * expected.float().std())


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**inputs()).logits


# ---- the flags


@pytest.mark.parametrize(
    ("flags", "parts", "strategy", "published"),
    [
        ([], "full full full", "full", (False, False, False)),
        (["--use_lora"], "lora lora lora", "LoRA", (True, False, False)),
        (["--use_qlora"], "lora lora lora", "QLoRA", (True, True, False)),
        (["--freeze_vision_model"], "frozen frozen full", "full with frozen vision", (False, False, True)),
        (["--freeze_vision_model", "--use_qlora"], "frozen frozen lora", "QLoRA with frozen vision", (True, True, True)),
        (named("lora", "lora", "lora"), "lora lora lora", "LoRA", (True, False, False)),
        (["--language", "lora"], "full full lora", "vision full, projector full, language LoRA", (True, False, False)),
        (["--use_lora", "--vision", "frozen"], "frozen lora lora", "vision frozen, projector LoRA, language LoRA", (True, False, False)),
        (["--use_qlora", "--projector", "full"], "lora full lora", "vision LoRA, projector full, language QLoRA", (True, True, False)),
        (["--freeze_vision_model", "--vision", "frozen"], "frozen frozen full", "full with frozen vision", (False, False, True)),
        (named("frozen", "full", "frozen"), "frozen full frozen", "vision frozen, projector full, language frozen", (False, False, False)),
    ],
)  # fmt: skip
def test_the_flags_set_the_parts_and_the_parts_the_published_flags(folder, flags, parts, strategy, published):
    args = recipe.arguments(folder, *flags)
    assert [getattr(args, part) for part in PARTS] == parts.split()
    assert args.strategy == strategy
    assert (args.use_lora, args.use_qlora, args.freeze_vision_model) == published
    # without LoRA float32 weights are DeepSpeed's to keep
    assert bool(args.deepspeed_config) == ("lora" not in parts)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--use_lora", "--vision", "full"], "--vision full with --use_lora: expected flags that agree"),
        (["--freeze_vision_model", "--projector", "full"], "--projector full with --freeze_vision_model: expected"),
        (["--use_qlora", "--language", "frozen"], "--language frozen with --use_qlora: expected flags that agree"),
        (named("frozen", "frozen", "frozen"), "expected a part that is full or lora, found all frozen"),
        (["--vision", "half"], "argument --vision: invalid choice: 'half'"),
        (["--vision", "frozen", "--vision_learning_rate", "1e-6"], "expected a vision that is trained, found it frozen"),
        (["--projector_learning_rate", "-1"], "--projector_learning_rate -1.0: expected a number of at least 0"),
        (["--lora_kwargs", "{}"], "--lora_kwargs without LoRA: expected --use_lora, or a part that is lora"),
        (["--lora_plus_ratio", "16"], "--lora_plus_ratio without LoRA"),
        (["--language", "lora", "--lora_plus_ratio", "16"], "with a part that is full: expected LoRA alone"),
        (["--use_lora", "--lora_plus_ratio", "0.5"], "--lora_plus_ratio 0.5: expected a number of at least 1"),
        (
            ["--vision_learning_rate", "1e-6", "--deepspeed", '{"optimizer": {"type": "AdamW"}}'],
            "--vision_learning_rate with --deepspeed {\"optimizer\": {\"type\": \"AdamW\"}}: expected a config without an optimizer",
        ),
    ],
)  # fmt: skip
def test_contradictions_get_one_line(folder, flags, says):
    with pytest.raises(InputError) as caught:
        recipe.arguments(folder, *flags)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{", "--lora_kwargs {: expected JSON, found:"),
        ("[1]", "expected a JSON object, found list"),
        ('{"use_dorra": true}', "expected fields of PEFT's LoraConfig, found use_dorra; did you mean use_dora"),
        ('{"r": 8}', "expected r to be left out, it follows from --lora_rank"),
        ('{"target_modules": ["x"]}', "it follows from --vision, --projector and --language lora"),
        ('{"task_type": "CAUSAL_LM"}', "expected task_type to be left out: PEFT fills it in"),
        ('{"loftq_config": {}}', "expected loftq_config to be left out: it wants data"),
        ('{"use_dora": "yes"}', "use_dora: expected what LoraConfig takes, found 'yes'"),
        ('{"rank_pattern": {"o_proj": "x"}, "bias": "some"}', "bias: expected what LoraConfig takes, found 'some'"),
        ('{"init_lora_weights": "pissa_niter_4"}', 'expected one of true, false, "gaussian"'),
        ('{"init_lora_weights": 1}', "init_lora_weights: expected one of true"),
        ('{"layers_to_transform": [0]}', "expected fields that go together, found:"),
        ('{"lora_bias": true}', "expected lora_bias to be left out: the language model's layers have no bias"),
    ],
)
def test_wrong_lora_kwargs_get_one_line(folder, given, says):
    with pytest.raises(InputError) as caught:
        recipe.arguments(folder, "--use_lora", "--lora_kwargs", given)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pissa_over_4_bits_is_refused(folder):
    with pytest.raises(InputError, match="pissa with --use_qlora: expected weights that it can change"):
        recipe.arguments(folder, "--use_qlora", "--lora_kwargs", '{"init_lora_weights": "pissa"}')


# ---- what is trained


@pytest.mark.parametrize("name", COMBINATIONS)
def test_exactly_the_parts_that_are_named_are_trained(folder, name):
    args = arguments(folder, *COMBINATIONS[name])
    model = load_model(args)
    found = {part: set() for part in PARTS}
    for parameter, value in model.named_parameters():
        if value.requires_grad:
            part = {"vision tower": "vision", "projector": "projector"}.get(part_below(parameter), "language")
            found[part].add("lora" if "lora_" in parameter else "full")
            assert not any(layer in parameter for layer in NEVER_RUN)
            assert value.dtype == torch.float32
    expected = {part: set() if getattr(args, part) == "frozen" else {getattr(args, part)} for part in PARTS}
    assert found == expected
    # with or without a picture each of them gets a gradient: DDP would wait for it
    for text in (False, True):
        model.train()
        model(**inputs(text), labels=inputs(text)["input_ids"]).loss.backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad != (p.grad is not None)]
        assert not without
        model.zero_grad()
    # and all weights of a part that is full are: but the last layer of CLIP and, beside LoRA, the two separators
    plain = dict(Phi3VForCausalLM.from_pretrained(folder).named_parameters())
    trained = {
        parameter.replace("base_model.model.", "").replace("modules_to_save.default.", "")
        for parameter, value in model.named_parameters()
        if value.requires_grad and "lora_" not in parameter
    }
    kinds = {"vision tower": args.vision, "projector": args.projector, "language model": args.language}
    everything = {parameter for parameter in plain if kinds[part_below(parameter)] == "full"}
    left_out = {parameter for parameter in everything - trained if not any(layer in parameter for layer in NEVER_RUN)}
    separators = {f"model.{VISION}.glb_GN", f"model.{VISION}.sub_GN"}
    assert left_out == (separators if args.use_lora and args.projector == "full" else set())
    assert trained <= everything


def test_updates_smaller_than_16_bits_can_hold_are_not_lost(tmp_path):
    half = recipe.model_folder(tmp_path / "half", torch.bfloat16)
    model = load_model(arguments(half, *COMBINATIONS["projector full, the others LoRA"], "--bf16"))
    weight = model.get_base_model().model.vision_embed_tokens.img_projection.modules_to_save.default[0].weight
    before = weight.detach().clone()
    train(model, steps=1, dtype=torch.bfloat16, rate=1e-4)
    assert weight.dtype == torch.float32
    changed = [(found != before.to(found.dtype)).float().mean() for found in (weight, weight.bfloat16())]
    assert changed[0] > 0.9
    assert changed[1] < 0.1
    # beside them the frozen weights stay in 16 bits
    assert model.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16


# ---- saved, loaded, merged


@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", WITH_LORA)
def test_an_adapter_holds_the_trained_parts_for_peft_phi3v_and_the_merge(folder, tmp_path, name, precision):
    base, dtype = folder, torch.float32
    if precision:
        base, dtype = recipe.model_folder(tmp_path / "half", torch.bfloat16), torch.bfloat16
    args = arguments(base, *WITH_LORA[name], *precision)
    model = train(load_model(args), dtype=dtype)
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = {parameter for parameter, value in model.named_parameters() if value.requires_grad}
    plain_names = {name.replace(".modules_to_save.default", "").replace(".default", "") for name in trained}
    assert set(stored) == plain_names
    assert all(value.dtype == torch.float32 for value in stored.values())

    settings = {part: getattr(args, part) for part in PARTS} | {"use_qlora": args.use_qlora}
    saved = find_saved(str(tmp_path / "adapter"))
    saved.settings = settings
    ours = open_model(saved, dtype, args.use_qlora, torch.device("cpu"))
    with torch.autocast("cpu", dtype=dtype, enabled=bool(precision)):
        # in 16 bits one product for PEFT's three rounds otherwise
        assert near(logits(ours), logits(model), 0.05 if precision else 1e-5)
    for parameter, value in ours.named_parameters():
        if "modules_to_save" in parameter:
            assert torch.equal(value, dict(model.named_parameters())[parameter]), parameter
    if args.use_qlora:
        return
    # plain PEFT rounds to the base's dtype what was trained in full
    theirs = PeftModel.from_pretrained(Phi3VForCausalLM.from_pretrained(base, dtype=dtype), tmp_path / "adapter")
    with torch.autocast("cpu", dtype=dtype, enabled=bool(precision)):
        assert near(logits(theirs), logits(model), 0.05 if precision else 1e-5)
    merged = merge.merge(find_saved(str(tmp_path / "adapter")), dtype)
    expected = Phi3VForCausalLM.from_pretrained(base).state_dict()
    assert merged.state_dict().keys() == expected.keys()
    if not precision:
        assert torch.allclose(logits(merged), logits(model), atol=1e-4)
        assert (logits(merged) - logits(Phi3VForCausalLM.from_pretrained(base))).abs().max() > 1e-2


def test_the_merge_command_holds_the_copies_against_the_adapter(folder, tmp_path, monkeypatch, capsys):
    model = train(load_model(arguments(folder, *COMBINATIONS["vision and projector full, language LoRA"])))
    model.save_pretrained(tmp_path / "adapter")
    commands.call(monkeypatch, merge, tmp_path / "adapter", tmp_path / "merged")
    assert "3 of 3 answers the same" in capsys.readouterr().out
    assert torch.allclose(logits(Phi3VForCausalLM.from_pretrained(tmp_path / "merged")), logits(model), atol=1e-4)


def test_an_adapter_is_scored_as_what_it_was_trained_on(folder, tmp_path):
    model = load_model(arguments(folder, *COMBINATIONS["QLoRA, projector full"]))
    model.save_pretrained(tmp_path / "adapter")
    settings = {"vision": "frozen", "projector": "full", "language": "lora"}
    record = {"script": "s", "started": "", "spread": {}, "rows": {}, "settings": settings}
    recipe.write_jsonl(tmp_path / "adapter" / "run.json", [record])
    args = recipe.arguments(tmp_path / "adapter", "--do_train", "False", "--use_qlora")
    load_processor(args)
    assert args.strategy == "vision frozen, projector full, language QLoRA"


# ---- more of PEFT's LoRA


VARIANTS = {
    "DoRA": '{"use_dora": true}',
    "rsLoRA": '{"use_rslora": true}',
    "PiSSA": '{"init_lora_weights": "pissa"}',
    "OLoRA": '{"init_lora_weights": "olora"}',
    "MiCA": '{"init_lora_weights": "mica"}',
    "rank_pattern": '{"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 8}}',
    "biases": '{"bias": "all"}',
    "exclude_modules": '{"exclude_modules": ["lm_head"]}',
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_computed_saved_loaded_and_merged_as_peft_does(folder, tmp_path, name):
    args = arguments(folder, "--use_lora", "--lora_kwargs", VARIANTS[name])
    model = load_model(args)
    if name != "rank_pattern":
        assert all(value.requires_grad for key, value in model.named_parameters() if "lora_A" in key)
    before = logits(Phi3VForCausalLM.from_pretrained(folder))
    # none of them changes what the model says before it is trained
    assert torch.allclose(logits(model), before, atol=1e-3)
    train(model)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    replaced = [isinstance(variant, OneProduct) for layer in layers for variant in layer.lora_variant.values()]
    assert all(replaced) == (name not in ("DoRA", "MiCA"))
    if name == "rank_pattern":
        assert {layer.r["default"] for layer in layers} == {2, 4}
        assert {layer.scaling["default"] for layer in layers} == {2, 4}
    if name == "exclude_modules":
        assert not isinstance(model.get_base_model().lm_head, LoraLayer)
    assert not any(layer in key for key, p in model.named_parameters() if p.requires_grad for layer in NEVER_RUN)
    expected = logits(model)
    assert not torch.allclose(expected, before, atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(Phi3VForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.allclose(logits(theirs), expected, atol=1e-4)
    merged = merge.merge(find_saved(str(tmp_path / "adapter")), torch.float32)
    assert torch.allclose(logits(merged), expected, atol=2e-4)


def test_dora_in_bfloat16_says_what_it_says_in_float32(tmp_path):
    half = recipe.model_folder(tmp_path / "half", torch.bfloat16)
    flags = ["--use_lora", "--lora_kwargs", VARIANTS["DoRA"]]
    train(load_model(arguments(half, *flags))).save_pretrained(tmp_path / "adapter")
    saved = find_saved(str(tmp_path / "adapter"))
    exact, rounded = (open_model(saved, kind, False, torch.device("cpu")) for kind in (torch.float32, torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(rounded)
    assert near(found, logits(exact), 0.05)


@pytest.mark.parametrize("name", ["DoRA", "rsLoRA", "rank_pattern"])
def test_variants_over_4_bits(folder, tmp_path, name):
    args = arguments(folder, "--use_qlora", "--lora_kwargs", VARIANTS[name])
    model = train(load_model(args))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = open_model(find_saved(str(tmp_path / "adapter")), torch.float32, True, torch.device("cpu"))
    assert torch.allclose(logits(again), expected, atol=1e-4)


def test_biases_of_a_frozen_part_stay(folder):
    model = load_model(arguments(folder, *named("frozen", "frozen", "lora"), "--lora_kwargs", '{"bias": "all"}'))
    assert not [name for name, p in model.named_parameters() if p.requires_grad and VISION in name]


# ---- rates


def trainer_of(args, model) -> RecipeTrainer:
    return RecipeTrainer(model=model, args=args)


def groups_of(args, model) -> list[dict]:
    trainer = trainer_of(args, model)
    trainer.create_optimizer()
    # as with DeepSpeed, a second time
    return trainer.create_optimizer().param_groups


@pytest.mark.parametrize("name", ["vision and projector full, language LoRA", "language frozen"])
def test_each_part_has_its_rate_and_decay_where_the_trainer_has_it(folder, name):
    flags = [*COMBINATIONS[name], "--deepspeed", "none", "--learning_rate", "1e-3"]
    own = ["--vision_learning_rate", "1e-4", "--projector_learning_rate", "5e-4"]
    args = arguments(folder, *flags, *own)
    model = load_model(args)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    rates = {"vision tower": 1e-4, "projector": 5e-4, "language model": 1e-3}
    found = {}
    for group in groups_of(args, model):
        for parameter in group["params"]:
            key = names[id(parameter)]
            assert group["lr"] == rates[part_below(key)], key
            found[key] = group["weight_decay"]
    plain = arguments(folder, *flags)
    expected = {names[id(p)]: group["weight_decay"] for group in groups_of(plain, model) for p in group["params"]}
    assert found == expected
    assert {0, 0.01} == set(expected.values())


def test_without_rates_the_groups_are_the_trainers(folder):
    args = arguments(folder, "--use_lora")
    groups = [{"params": [1], "lr": 1}]
    assert group_by_rate(groups, None, args) == groups


def test_lora_plus_has_the_groups_of_peft_in_each_part(folder):
    args = arguments(folder, "--use_lora", "--lora_plus_ratio", "16", "--vision_learning_rate", "1e-5")
    model = load_model(args)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=4e-5, loraplus_lr_ratio=16, loraplus_weight_decay=0.01
    )
    expected = {id(p): (group["lr"], group["weight_decay"]) for group in theirs.param_groups for p in group["params"]}
    optimizer = trainer_of(args, model).create_optimizer()
    assert type(optimizer) is type(lora_plus_optimizer(model, args))
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    counted = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rate, decay = expected[id(parameter)]
            factor = 0.25 if part_below(names[id(parameter)]) == "vision tower" else 1
            assert group["lr"] == pytest.approx(rate * factor)
            assert group["weight_decay"] == decay
            counted += 1
    assert counted == len(expected)
    assert {group["rate_of"] for group in optimizer.param_groups} == {
        name for part in PARTS for name in (part, f"{part}_B")
    }


# ---- planned


@pytest.mark.parametrize(
    "choices", [*STRATEGIES.values(), Choices("full", "full", "lora"), Choices("frozen", "full", "lora", True)]
)
def test_a_choice_has_a_name_and_flags_that_lead_back_to_it(folder, choices):
    assert choices_named(choices.name) == choices
    assert choices_of(recipe.arguments(folder, *choices.flags.split())) == choices


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_planner_counts_what_is_there(folder, name):
    args = arguments(folder, *COMBINATIONS[name])
    model, config = load_model(args), tiny.config()
    counted = count_parameters(FakeModel(config, args))
    real = list(model.parameters())
    assert counted.trained == sum(p.numel() for p in real if p.requires_grad)
    assert counted.all == sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in real)
    planner = fitting.Planner(config, args, 1, 40, 2)
    setting = fitting.setting_of(args, "full")
    assert choices_of(planner.arguments(setting)) == choices_of(args)
    assert planner.memory(setting).peak > 0
    assert all(found != setting for found in fitting.smaller(setting))


@pytest.mark.parametrize(
    ("flag", "given"),
    [
        ("--use_lora", '{"use_dora": true}'),
        ("--use_qlora", '{"use_dora": true}'),
        ("--use_lora", '{"init_lora_weights": "pissa"}'),
    ],
)
def test_the_planner_measures_what_it_has_not_stored(folder, flag, given):
    plain = arguments(folder, flag, "--bf16")
    args = arguments(folder, flag, "--bf16", "--lora_kwargs", given)
    batch = fitting.Planner(tiny.config(), args, 1, 40, 2).batch(1)
    ours, theirs = (Activations(tiny.config(), found).of(batch, "none") for found in (args, plain))
    # DoRA makes each adapted weight whole once more
    assert ours.traffic > theirs.traffic if "dora" in given else ours == theirs
    counts = [count_parameters(FakeModel(tiny.config(), found)).quantised for found in (args, plain)]
    assert counts[0] == counts[1]
    assert bool(counts[0]) == (flag == "--use_qlora")


def test_planning_does_not_change_the_runs_arguments(folder):
    args = arguments(folder, *COMBINATIONS["language frozen"])
    before = copy.copy(vars(args))
    planner = fitting.Planner(tiny.config(), args, 1, 40, 2)
    for found in fitting.smaller(fitting.setting_of(args, "full")):
        planner.arguments(found)
    assert vars(args) == before
