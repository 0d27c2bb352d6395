"""What a run is known by: each argument that can change its result, the model's weights, and its rows, in words."""

import copy
import dataclasses
import json
import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import recipe
import torch
from safetensors.torch import load_file, save_file

from finetuning.arguments import ZERO2, RecipeArguments
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.fingerprint import Fingerprint, fingerprint
from finetuning.own_data_arguments import OwnDataArguments
from finetuning.training.identity import (
    CHOOSING_THE_BEST,
    WITHOUT_EFFECT,
    describe_rows,
    describe_settings,
    digest_rows,
    identify_model,
    read_rows,
    read_run,
    settings_of,
    spread_of,
    time_of,
    write_run,
)

own_process = pytest.fixture(autouse=True)(recipe.own_process)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return recipe.model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def args(folder) -> RecipeArguments:
    return recipe.arguments(folder, "--use_lora")


# ---- arguments

FIELDS = [field.name for field in dataclasses.fields(OwnDataArguments) if field.init]


def test_the_arguments_without_effect_are_arguments():
    assert set(FIELDS) >= WITHOUT_EFFECT >= CHOOSING_THE_BEST


@pytest.mark.parametrize("name", FIELDS)
def test_every_argument_counts_unless_it_is_known_to_have_no_effect(folder, name):
    # The script for one's own data has them all.
    args = recipe.arguments(folder, "--use_lora", "--dataset", "me/pages", kind=OwnDataArguments)
    before = settings_of(args)
    changed = copy.copy(args)
    if name == "deepspeed":
        changed.deepspeed_config = {"zero_optimization": {"stage": 1}}
    else:
        object.__setattr__(changed, name, "another value")
    assert (settings_of(changed) != before) == (name not in WITHOUT_EFFECT)


@pytest.mark.parametrize(
    "flags",
    [
        *(["--data_seed", "7"], ["--label_smoothing_factor", "0.1"], ["--weight_decay", "0.5"], ["--seed", "1"]),
        *(["--learning_rate", "1e-3"], ["--batch_size", "8"], ["--num_train_epochs", "2"], ["--max_steps", "3"]),
        *(["--lora_rank", "8"], ["--lora_dropout", "0.1"], ["--num_crops", "3"], ["--freeze_vision_model"], ["--bf16"]),
        *(["--padding_free"], ["--neftune_noise_alpha", "5"], ["--optim", "sgd"], ["--adam_beta2", "0.9"]),
        *(["--dataloader_drop_last"], ["--lr_scheduler_type", "cosine"], ["--warmup_steps", "3"]),
        *(["--train_sampling_strategy", "sequential"], ["--max_grad_norm", "0.1"], ["--attn_implementation", "eager"]),
        *(["--lr_scheduler_kwargs", '{"num_cycles": 2}', "--lr_scheduler_type", "cosine"],),
    ],
    ids=" ".join,
)
def test_flags_that_change_the_result_are_another_run(folder, args, flags):
    found = describe_settings(settings_of(recipe.arguments(folder, "--use_lora", *flags)), settings_of(args))
    assert any(flags[0].removeprefix("--") in difference and " instead of " in difference for difference in found)


@pytest.mark.parametrize(
    "flags",
    [
        *(["--save_steps", "3"], ["--logging_steps", "1"], ["--batch_size_per_gpu", "4"], ["--output_dir", "other"]),
        *(["--max_new_tokens", "3"], ["--eval_size", "1"], ["--recompute", "none"], ["--dataloader_num_workers", "2"]),
        *(["--save_total_limit", "9"], ["--on_nonfinite", "skip"], ["--on_bad_row", "skip"], ["--report_to", "none"]),
        *(["--run_name", "x"], ["--max_length", "99"], ["--resume_from_checkpoint"], ["--hub_token", "secret"]),
    ],
    ids=" ".join,
)
def test_flags_that_cannot_change_the_result_are_the_same_run(folder, args, flags):
    assert settings_of(recipe.arguments(folder, "--use_lora", *flags)) == settings_of(args)


def test_an_argument_of_a_later_version_counts_by_default(args):
    @dataclasses.dataclass
    class Later(RecipeArguments):
        brand_new: int = 0

        def __post_init__(self):
            pass

    later = Later()
    vars(later).update(vars(args))
    before = settings_of(later)
    later.brand_new = 1
    assert describe_settings(settings_of(later), before) == ["brand_new 1 instead of 0"]


BEST = ["--load_best_model_at_end", "--eval_strategy", "steps", "--save_steps", "4", "--eval_steps", "2"]


def test_where_the_best_checkpoint_is_taken_its_choice_counts(folder):
    best = settings_of(recipe.arguments(folder, "--use_lora", *BEST))
    for flags, name in ((["--eval_size", "1"], "eval_size"), (["--eval_steps", "1"], "eval_steps")):
        other = settings_of(recipe.arguments(folder, "--use_lora", *BEST, *flags))
        assert any(difference.startswith(name) for difference in describe_settings(other, best))


def test_deepspeed_counts_by_its_content(folder, tmp_path):
    config = json.loads(ZERO2.read_text())
    (tmp_path / "copy.json").write_text(json.dumps(config, indent=7, sort_keys=True))
    given = [[], ["--deepspeed", str(tmp_path / "copy.json")], ["--deepspeed", json.dumps(config)]]
    found = [settings_of(recipe.arguments(folder, *flags)) for flags in given]
    assert found[0] == found[1] == found[2]
    config["zero_optimization"]["stage"] = 1
    other = settings_of(recipe.arguments(folder, "--deepspeed", json.dumps(config)))
    assert [text.split()[0] for text in describe_settings(other, found[0])] == ["deepspeed"]
    none = settings_of(recipe.arguments(folder, "--deepspeed", "none"))
    assert none["deepspeed"] is None


def test_settings_are_the_same_after_they_were_written(args):
    settings = settings_of(args)
    assert json.loads(json.dumps(settings)) == settings


def test_a_secret_is_no_part_of_what_is_written(folder):
    assert "secret" not in json.dumps(settings_of(recipe.arguments(folder, "--use_lora", "--hub_token", "hf_secret")))


def test_the_spread_says_processes_micro_batch_and_engine(folder, args):
    assert spread_of(args) == {"processes": 1, "batch_size_per_gpu": 1, "engine": "DistributedDataParallel"}
    assert spread_of(recipe.arguments(folder, "--batch_size_per_gpu", "2")) == {
        "processes": 1,
        "batch_size_per_gpu": 2,
        "engine": "DeepSpeed",
    }


# ---- the model


def test_weights_that_are_replaced_in_place_are_another_model(tmp_path):
    folder = recipe.model_folder(tmp_path / "model")
    args = recipe.arguments(folder, "--use_lora")
    before, path = settings_of(args), folder / "model.safetensors"
    status, weights = path.stat(), load_file(path)
    save_file({name: torch.randn_like(tensor) for name, tensor in weights.items()}, path, {"format": "pt"})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    (difference,) = describe_settings(settings_of(args), before)
    assert difference.startswith("weights of the model ")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_other_files_of_the_model_count(tmp_path, name):
    folder = recipe.model_folder(tmp_path / "model")
    before = identify_model(str(folder))
    assert identify_model(str(folder)) == before
    content = (folder / name).read_text()
    (folder / name).write_text(content.replace("1", "7", 1))
    assert identify_model(str(folder)) != before


def test_a_moved_model_folder_is_named_and_a_hub_name_is_not_looked_up(tmp_path, folder):
    assert identify_model("microsoft/Phi-3.5-vision-instruct") is None
    first = identify_model(str(folder))
    (tmp_path / "notes.txt").write_text("not part of it")
    assert first == identify_model(str(folder))


# ---- rows


def row(name: str, prompt="What?", answers=("yes",), picture=b"0") -> Fingerprint:
    known = fingerprint(Conversation(name, [Turn(prompt, list(answers))]))
    known.pictures = picture
    return known


ROWS = [row(f"r{number}", f"Question {number}?", [f"answer {number}"]) for number in range(5)]


def changed(**changes) -> list[Fingerprint]:
    """ROWS with others in their places: `r1=row(...)`."""
    return [changes.get(known.id, known) for known in ROWS]


CHANGES = {
    "nothing": (ROWS, None),
    "a prompt": (
        changed(r1=row("r1", "Question one?", ["answer 1"])),
        "other prompts in 1 of 5 rows to train on (first 'r1': 'Question one? -> answer 1' instead of 'Question 1? -> answer 1')",
    ),
    "an answer": (
        changed(r3=row("r3", "Question 3?", ["three"])),
        "other answers in 1 of 5 rows to train on (first 'r3': '...stion 3? -> three' instead of '...stion 3? -> answer 3')",
    ),
    "a picture": (
        changed(r2=row("r2", "Question 2?", ["answer 2"], b"1")),
        "other pictures in 1 of 5 rows to train on (first 'r2')",
    ),
    "the order": (
        [ROWS[0], ROWS[2], ROWS[1], *ROWS[3:]],
        "the rows to train on in another order (first 'r2')",
    ),
    "a row more": ([*ROWS, row("new")], "1 more rows to train on (first 'new')"),
    "a row less": (ROWS[1:], "1 rows to train on missing (first 'r0')"),
    "a row for another": (
        [*ROWS[:4], row("new")],
        "1 more rows to train on (first 'new'), 1 rows to train on missing (first 'r4')",
    ),
    "all prompts": (
        [row(f"r{number}", f"Q{number}?", [f"answer {number}"]) for number in range(5)],
        "other prompts in 5 of 5 rows to train on (first 'r0': 'Q0? -> answer 0' instead of 'Question 0? -> answer 0')",
    ),
    "a prompt and another row's answer": (
        changed(r0=row("r0", "Which?", ["answer 0"]), r1=row("r1", "Question 1?", ["x"])),
        "other prompts in 1 of 5 rows to train on (first 'r0': 'Which? -> answer 0' instead of 'Question 0? -> answer 0'), "
        "other answers in 1 of 5 rows to train on (first 'r1': '...stion 1? -> x' instead of '...stion 1? -> answer 1')",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_what_differs_is_said_in_words(case):
    now, text = CHANGES[case]
    assert describe_rows(now, ROWS, "to train on") == text
    assert (digest_rows(now) == digest_rows(ROWS)) == (text is None)


def test_rows_that_are_not_known_any_more_are_other_rows():
    assert describe_rows(ROWS, None, "to train on") == "other rows to train on"


def test_long_texts_are_shown_from_where_they_part():
    now, then = row("a", "x" * 500 + "new text"), row("a", "x" * 500 + "old text " + "y" * 500)
    text = describe_rows([now], [then], "to train on")
    assert "'...xxxxxxxxxxxxnew text -> yes' instead of '...xxxxxxxxxxxxold text y" in text
    assert len(text) < 250


def test_a_text_of_several_lines_stays_in_one():
    text = describe_rows([row("a", "one\ntwo\x1b[2J")], [row("a", "one\nthree")], "to train on")
    assert text.isprintable()


def test_what_stands_beyond_the_kept_texts_is_still_noticed():
    now, then = row("a", "new"), row("a", "old")
    now.text = then.text = ""
    assert describe_rows([now], [then], "to answer") == "other prompts in 1 of 1 rows to answer (first 'a')"


@pytest.mark.parametrize("part", ["id", "prompts", "answers", "pictures"])
def test_each_part_is_in_the_digest(part):
    other = dataclasses.replace(ROWS[0], **{part: "other" if part == "id" else b"other"})
    assert digest_rows([other]) != digest_rows(ROWS[:1])
    assert digest_rows([dataclasses.replace(ROWS[0], text="")]) == digest_rows(ROWS[:1])


def test_written_rows_are_read_again_by_split(tmp_path):
    record = {"script": "x.py", "settings": {}, "spread": {}, "rows": {}, "started": "2026-01-01T00:00:00"}
    write_run(tmp_path, record, {"train": ROWS, "eval": ROWS[:2]})
    assert read_rows(tmp_path, "train") == ROWS
    assert read_rows(tmp_path, "eval") == ROWS[:2]
    assert read_run(tmp_path) == record
    # without rows those that stand there stay
    write_run(tmp_path, {**record, "summary": "é"})
    assert read_run(tmp_path)["summary"] == "é"
    assert read_rows(tmp_path, "train") == ROWS
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("content", [None, b"", b"PAR1 torn", "half"], ids=str)
def test_rows_that_cannot_be_read_are_not_known(tmp_path, content):
    record = {"script": "x.py", "settings": {}, "spread": {}, "rows": {}, "started": "2026-01-01T00:00:00"}
    write_run(tmp_path, record, {"train": ROWS, "eval": []})
    path = tmp_path / "run_rows.parquet"
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert read_rows(tmp_path, "train") is None


@pytest.mark.parametrize("content", [None, "", "{", "[]", "7", '"x"', '{"script": "x.py"}', "\x00"], ids=repr)
def test_a_torn_run_file_is_no_run(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert read_run(tmp_path) is None


def test_ids_of_any_text_can_be_written(tmp_path):
    names = ["", "日本", "a\nb", "'", "x" * 5000]
    found = [row(name) for name in names]
    write_run(tmp_path, {}, {"train": found})
    assert [known.id for known in read_rows(tmp_path, "train")] == names


def test_settings_are_described_with_both_values():
    now, then = {"a": 1, "b": "x" * 200, "new": True}, {"a": 2, "b": "y", "old": None}
    found = describe_settings(now, then)
    assert found[0] == "a 1 instead of 2"
    assert found[1].startswith("b 'xxx")
    assert found[1].endswith("...' instead of 'y'")
    assert len(found[1]) < 100
    assert found[2] == "new true instead of null"
    assert describe_settings(now, now) == []


def test_a_time_is_said_as_people_say_it():
    today = datetime.now().replace(hour=12, minute=40, second=0, microsecond=0)
    assert time_of(today.isoformat()) == "12:40"
    before = today - timedelta(days=3)
    assert time_of(before.isoformat()) == f"{before:%Y-%m-%d} 12:40"
