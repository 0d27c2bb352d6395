"""The checker of data folders: clean folders are measured as training counts them, every fault has its file and line."""

import base64
import io
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from bad_rows import good_row, png_header, write_folder
from PIL import ExifTags, Image
from recipe import write_jsonl
from transformers import AutoTokenizer

from finetuning import environment, validate
from finetuning.data import formats
from finetuning.data.conversation import to_messages
from finetuning.data.encoding import count_tokens, encode_conversation
from finetuning.data.images import image_sizes
from finetuning.data.reading import read_jsonl, read_splits
from finetuning.data.schemas import ConvertedRow, parse_row
from finetuning.errors import InputError
from phi3v import Phi3VImageProcessor, Phi3VProcessor

OFFICIAL_FOLDER = Path(__file__).parents[2] / "shared" / "phi35v"


@pytest.fixture(autouse=True)
def own_limit(monkeypatch):
    """The limit of pixels that a test sets is gone in the next."""
    monkeypatch.setenv(environment.PIXEL_LIMIT, str(environment.MAX_IMAGE_PIXELS))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a processor: all that the checker reads of a model."""
    folder = tmp_path_factory.mktemp("model")
    tiny.processor().save_pretrained(folder)
    return str(folder)


def from_converted(row: dict):
    return parse_row(row, ConvertedRow).to_conversation()


def row(number: int | str, images=(), user="What is it?", assistant="A cat", **changes) -> dict:
    turn = {"images": list(images), "user": user, "assistant": assistant}
    return {"id": number, "conversations": [turn], **changes}


def save(folder: Path, *names: str, size=(60, 40)) -> None:
    """Images, all different."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tiny.picture(*size, seed=sum(name.encode())).save(folder / name)


@pytest.fixture
def good(tmp_path) -> Path:
    """A folder in the native form: several images, turns, answers, tags of its own and no image at all."""
    save(tmp_path / "images", "a.png", "sub/b.jpg", size=(90, 30))
    save(tmp_path / "images", "c.png", "d.jpg", size=(30, 70))
    several = row("t2", ["a.png", "sub/b.jpg"], source="here")
    several["conversations"].append(
        {"images": ["c.png"], "user": "And here?", "assistant": ["no", "not in the", "日本語"]}
    )
    tagged = row("t3", ["a.png", "c.png"], user="Is <|image_2|> in <|image_1|> or <|image_2|> in it?")
    write_jsonl(tmp_path / "mine_train.jsonl", [row("t1", ["a.png"]), several, tagged, row("t4", user="é 日本?")])
    write_jsonl(tmp_path / "mine_val.jsonl", [row("v1", ["d.jpg"]), row("v2")])
    return tmp_path


def run(capsys, folder: Path, *flags: str) -> tuple[int, str]:
    """Exit status and standard output."""
    status = validate.main([str(folder), *map(str, flags)])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return status, printed.out


def run_json(capsys, folder: Path, *flags: str) -> tuple[int, dict]:
    status, printed = run(capsys, folder, "--json", *flags)
    return status, json.loads(printed)


def test_a_good_folder_is_clean_and_a_table_says_what_is_in_it(good, model, capsys):
    status, printed = run(capsys, good, "--model_name_or_path", model, "--num_crops", 4, "--max_length", 900)
    assert status == 0
    lines = printed.splitlines()
    assert lines[0].split() == ["train", "val"]
    table = {line[:28].strip(): line[28:].split() for line in lines[1:-1]}
    assert table["samples"] == ["4", "2"]
    assert table["turns"] == ["5", "2"]
    assert table["images"] == ["6", "1"]
    assert table["images per sample, max"] == ["3", "1"]
    assert table["over max length"] == ["0", "0"]
    assert len({len(line) for line in lines[:-1]}) == 1  # aligned
    assert lines[-1] == f"{good}: clean (num_crops 4, max length 900 tokens)"


@pytest.mark.parametrize("images", ["decode", "headers"])
@pytest.mark.parametrize("num_crops", [1, 4])
def test_tokens_and_crops_are_those_of_training(good, model, images, num_crops, capsys):
    flags = ["--model_name_or_path", model, "--num_crops", num_crops, "--images", images]
    status, report = run_json(capsys, good, *flags)
    assert status == 0
    processor = tiny.processor(num_crops)
    for name, rows in zip(("train", "val"), read_splits(good, evaluation="val"), strict=True):
        conversations = [from_converted(row) for row in rows]
        lengths = [count_tokens(conversation, processor) for conversation in conversations]
        encoded = [encode_conversation(conversation, processor) for conversation in conversations]
        crops = [len(features.get("pixel_values", [])) for features in encoded]
        figures = report["splits"][name]
        assert figures["tokens_per_epoch"] == sum(lengths)
        assert figures["tokens_per_sample"]["max"] == max(lengths)
        assert figures["tokens_per_sample"]["mean"] == round(sum(lengths) / len(lengths), 1)
        assert figures["crops_per_sample"] == {"mean": round(sum(crops) / len(crops), 1), "max": max(crops)}
        image_id = processor.image_token_id
        assert figures["image_tokens_per_epoch"] == sum(row["input_ids"].count(image_id) for row in encoded)


def test_percentiles_are_lengths_that_occur():
    spread = validate._spread(list(range(1, 201)), ("mean", *validate.PERCENTILES))
    assert spread == {"mean": 100.5, "p50": 101, "p95": 191, "p99": 199, "max": 200}
    assert validate._spread([7], ("mean", "p50", "max")) == {"mean": 7, "p50": 7, "max": 7}


def test_an_image_on_its_side_counts_as_it_is_shown(tmp_path, model, capsys):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (tmp_path / "images").mkdir()
    for name in ("turned.jpg", "turned.png"):
        tiny.picture(200, 28).save(tmp_path / "images" / name, exif=exif)
    save(tmp_path / "images", "tall.jpg", size=(28, 200))
    for name in ("turned.jpg", "turned.png", "tall.jpg"):
        write_jsonl(tmp_path / f"{name[:-4]}-{name[-3:]}_train.jsonl", [row(1, [name])])
        write_jsonl(tmp_path / "test.jsonl", [row(1)])
        reports = [
            run_json(capsys, tmp_path, "--model_name_or_path", model, "--num_crops", 4, "--images", images)[1]
            for images in ("decode", "headers")
        ]
        assert reports[0] == reports[1]
        [conversation] = map(from_converted, read_splits(tmp_path)[0])
        assert reports[0]["splits"]["train"]["tokens_per_epoch"] == count_tokens(conversation, tiny.processor())
        next(tmp_path.glob("*_train.jsonl")).unlink()


def test_paths_opens_no_image_and_says_what_is_not_counted(good, model, monkeypatch, capsys):
    monkeypatch.setattr(Image, "open", None)
    status, report = run_json(capsys, good, "--model_name_or_path", model, "--images", "paths")
    assert status == 0
    figures = report["splits"]["train"]
    assert figures["images"] == 6
    assert figures["crops_per_sample"] is figures["image_tokens_per_epoch"] is None
    assert 0 < figures["tokens_per_epoch"] < 900
    assert ["crops and image tokens are not counted" in remark for remark in report["remarks"]] == [True]


def test_without_a_tokenizer_text_is_left_out_and_one_line_says_so(good, tmp_path_factory, capsys):
    flags = ["--model_name_or_path", tmp_path_factory.mktemp("none")]
    status, report = run_json(capsys, good, *flags)
    assert status == 0
    assert [remark.count("text tokens are not counted") for remark in report["remarks"]] == [1]
    assert len(report["remarks"][0].splitlines()) == 1
    figures = report["splits"]["train"]
    # five images, one shown twice, of more than a thousand tokens each: these are the official image processor's
    assert figures["tokens_per_epoch"] == figures["image_tokens_per_epoch"] > 7 * 313
    assert run_json(capsys, good, *flags, "--images", "paths")[1]["splits"]["train"]["tokens_per_sample"] is None
    # control tokens are found all the same
    write_jsonl(good / "mine_val.jsonl", [row("v1", user="<|end|>")])
    assert "control token <|end|>" in run(capsys, good, *flags)[1]


def test_a_hub_out_of_reach_is_asked_once(good, monkeypatch, capsys):
    asked = []

    def unreachable(*_, **options):
        asked.append(options)
        raise ConnectionError("no route to it")

    monkeypatch.setattr(validate.HfApi, "file_exists", unreachable)
    monkeypatch.setattr(validate.AutoProcessor, "from_pretrained", unreachable)
    status, report = run_json(capsys, good, "--model_name_or_path", "microsoft/Phi-3.5-vision-instruct")
    said = {"trust_remote_code": False}
    assert (status, asked) == (0, [{"local_files_only": True, **said}, {}])
    assert report["remarks"][0].endswith("text tokens are not counted (no route to it)")


def test_what_a_tokenizer_was_saved_with_changes_no_length(good):
    processor = tiny.processor()
    figures = validate.check_folder(good, processor)[2]
    processor.tokenizer.backend_tokenizer.enable_padding(length=500)
    processor.tokenizer.backend_tokenizer.enable_truncation(5)
    assert validate.check_folder(good, processor)[2] == figures


@pytest.mark.skipif(not OFFICIAL_FOLDER.is_dir(), reason="the official tokenizer is not here")
def test_the_official_tokenizer_counts_as_in_training(good, capsys):
    status, report = run_json(capsys, good, "--model_name_or_path", OFFICIAL_FOLDER, "--num_crops", 4)
    assert (status, report["max_length"]) == (0, 131072)
    processor = Phi3VProcessor(Phi3VImageProcessor(num_crops=4), AutoTokenizer.from_pretrained(OFFICIAL_FOLDER))
    lengths = [count_tokens(from_converted(row), processor) for row in read_splits(good, evaluation="val")[0]]
    assert report["splits"]["train"]["tokens_per_epoch"] == sum(lengths)


LONG = "very " * 400
# Lines of train.jsonl, each with a fault, and what is said of it. Good lines stand between them.
FAULTS = [
    ('{"id": 1, "conversations": [}', "expected a JSON object, found Expecting value at column 29"),
    ("[1, 2]", "expected a JSON object, found a list [1, 2]"),
    ("[" * 100_000, "expected a JSON object, found: maximum recursion depth"),
    ('{"id": ' + "1" * 5000 + "}", "expected a JSON object, found: Exceeds the limit"),
    (b'{"id": "\xff"}', "expected UTF-8 text, found the byte 0xff"),
    ({"conversations": [{"user": "q", "assistant": "a"}]}, "id: expected this field, found conversations"),
    ({"id": "f5", "img": "a.png", "label": 1}, 'sample f5: expected the field "conversations" (native, LLaVA, ShareGPT)'),
    (row("f6", conversations=[]), "sample f6: conversations: expected a list with at least 1 item(s), found 0"),
    (row("f7", user=None), "sample f7: conversations[0].user: expected text, found null"),
    (row("f8", conversations=[{"images": "a.png", "user": "q", "assistant": "a"}]), 'conversations[0].images: expected a list, found \''),
    (row("f9", assistant="  "), "sample f9: conversations[0].assistant: expected text, found '  '"),
    (row("f10", assistant=3), "sample f10: conversations[0].assistant: expected text or a list with at least one text, found 3"),
    (row("f11", assistant=[]), "sample f11: conversations[0].assistant: expected text or a list with at least one text, found an empty list"),
    (row("f12", ["gone.png"]), "images/gone.png: expected an image file, found no such file"),
    (row("f13", ["cut.png"]), "images/cut.png: expected a whole image, found: image file is truncated"),
    (row("f14", ["cut.jpg"]), "images/cut.jpg: expected a whole image, found: image file is truncated"),
    (row("f15", ["text.png"]), "images/text.png: expected a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM image, found another format or a damaged header"),
    (row("f16", ["../../secret.png"]), "sample f16: conversations[0].images[0]: expected an image path inside"),
    (row("f17", ["a\0.png"]), "sample f17: conversations[0].images[0]: expected an image path inside"),
    (row("f18b", ["."]), "sample f18b: conversations[0].images[0]: expected an image path inside"),
    (row("f18", user="See <|image_1|>"), "sample f18: image tags <|image_1|> for 0 image(s): expected no image tag"),
    (row("f19", ["a.png", "b.png"], user="<|image_1|>?"), "<|image_1|> for 2 image(s): expected <|image_1|> to <|image_2|>"),
    (row("f20", ["a.png"], assistant="<|image_1|>"), "sample f20, turn 1: answers[0]: expected image tags in user texts only"),
    (row("f21", user="a<|end|>b"), "sample f21, turn 1: user: expected plain text, found the control token <|end|>; remove it"),
    (row("f22", assistant="\ud800"), "sample f22, turn 1: answers[0]: expected Unicode text, found half a surrogate pair in '\\ud800'"),
    (row("good-0"), "sample good-0: id: expected an id of its own, found that of train.jsonl:2"),
    (row("f24", user=LONG), "sample f24: expected at most 900 tokens, found 2"),
]  # fmt: skip


@pytest.fixture
def faulty(tmp_path) -> Path:
    save(tmp_path / "images", "a.png", "b.png", "c.png")
    for name in ("cut.png", "cut.jpg"):
        tiny.picture(200, 200).save(tmp_path / "images" / name)
        (tmp_path / "images" / name).write_bytes((tmp_path / "images" / name).read_bytes()[:8000])
    (tmp_path / "images" / "text.png").write_text("not an image")
    with open(tmp_path / "train.jsonl", "wb") as file:
        for number, (line, _) in enumerate(FAULTS):
            line = json.dumps(line) if isinstance(line, dict) else line
            line = line.encode() if isinstance(line, str) else line
            file.write(line + b"\n" + json.dumps(row(f"good-{number}", ["a.png"])).encode() + b"\n\n")
    write_jsonl(tmp_path / "test.jsonl", [row("leak", ["c.png", "a.png"]), row("fine", ["c.png"])])
    return tmp_path


def test_every_fault_has_its_file_and_line(faulty, model, capsys):
    flags = ["--model_name_or_path", model, "--num_crops", 4, "--max_length", 900]
    status, printed = run(capsys, faulty, *flags, "--all")
    assert status == 2
    found = [line for line in printed.splitlines() if ".jsonl:" in line]
    leak, *found = found
    assert leak.startswith(f"{faulty}/test.jsonl:1: sample leak: expected images that train does not hold, found ")
    assert leak.endswith("/images/a.png, in train, train.jsonl:2 (1 of 2 images)")
    for number, (line, (_, message)) in enumerate(zip(found, FAULTS, strict=True)):
        assert line.startswith(f"{faulty}/train.jsonl:{1 + 3 * number}: "), line
        assert message in line
        assert "sample " in line or number < 6
    assert f"{len(FAULTS) + 1} fault(s)" in printed

    status, report = run_json(capsys, faulty, *flags, "--all")
    assert (status, report["complete"]) == (2, True)
    expected = [("test", 1), *(("train", 1 + 3 * number) for number in range(len(FAULTS)))]
    assert [(Path(fault["file"]).stem, fault["line"]) for fault in report["faults"]] == expected
    assert report["splits"]["train"]["over_max_length"] == 1
    # measured over the samples without a fault of their own
    assert report["splits"]["train"]["samples"] == len(FAULTS) + 1


def test_the_first_fault_is_enough_without_all(faulty, model, capsys):
    (faulty / "test.jsonl").write_text(json.dumps(row("fine")) + "\n")
    status, printed = run(capsys, faulty, "--model_name_or_path", model)
    first, last = printed.splitlines()
    assert status == 2
    assert first == f"{faulty}/train.jsonl:1: {FAULTS[0][1]}"
    assert last.startswith(f"{faulty}: stopped at the first fault, --all lists all")
    status, report = run_json(capsys, faulty, "--model_name_or_path", model)
    assert (status, report["complete"], len(report["faults"]), report["splits"]) == (2, False, 1, {})


@pytest.mark.parametrize("images", ["headers", "paths"])
def test_missing_images_are_found_without_decoding(images, faulty, model, capsys):
    status, printed = run(capsys, faulty, "--model_name_or_path", model, "--images", images, "--all")
    assert status == 2
    assert "sample f12, turn 1: images[0]: " in printed
    assert ("sample f15, turn 1: " in printed) == (images == "headers")
    assert "sample f13" not in printed


def test_leakage_goes_by_content(tmp_path, model, capsys):
    images = tmp_path / "images"
    save(images, "a.bmp", "b.bmp", "c.bmp", "d.bmp")  # all of one size in bytes
    shutil.copy(images / "a.bmp", images / "copy.bmp")
    write_jsonl(tmp_path / "train.jsonl", [row(1, ["b.bmp"]), row(2, ["b.bmp", "a.bmp"])])
    write_jsonl(tmp_path / "val.jsonl", [row(1, ["c.bmp"]), row(2, ["d.bmp", "copy.bmp", "b.bmp"])])
    write_jsonl(tmp_path / "test.jsonl", [row(1, ["c.bmp"])])  # in val, not in train
    for mode in ("decode", "headers"):
        status, printed = run(capsys, tmp_path, "--model_name_or_path", model, "--all", "--images", mode)
        assert status == 2
        [line] = [line for line in printed.splitlines() if "train does not hold" in line]
        assert line.startswith(f"{tmp_path}/val.jsonl:2: sample 2: ")
        assert line.endswith(f"{images}/copy.bmp, in train as {images}/a.bmp, train.jsonl:2 (2 of 3 images)")
    # without reading, by path alone
    printed = run(capsys, tmp_path, "--model_name_or_path", model, "--all", "--images", "paths")[1]
    assert f"found {images}/b.bmp, in train, train.jsonl:1 (1 of 3" in printed


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"mine_train.jsonl": [row(1)]}, "expected a split test, found train; name a file test.jsonl or NAME_test.jsonl"),
        ({"data.jsonl": [row(1)], "test.jsonl": [row(1)]}, "expected a split train, found data, test"),
        ({"a_train.jsonl": [row(1)], "b_train.jsonl": [row(2)], "test.jsonl": [row(1)]}, "found a_train.jsonl, b_train.jsonl"),
        ({"rows.jsonl": [row(1, split="train"), row(1, split="test")], "val.jsonl": [row(1)]}, "found rows.jsonl and val.jsonl"),
        ({"train.jsonl": [row(1)], "a_test.jsonl": [{}]}, "a_test.jsonl:1: expected the field"),
        ({"rows.jsonl": [row(1)]}, "rows.jsonl:1: sample 1: split: expected the name of a split, such as train or test, found null"),
        ({"rows.jsonl": [row(1, split="../x")]}, "rows.jsonl:1: sample 1: split: expected the name of a split, such as train or test, found '../x'"),
        ({"train.jsonl": [], "test.jsonl": [row(1)]}, "train.jsonl: expected at least one row, found none"),
        ({"train.jsonl": [row("a"), row("a")], "test.jsonl": [row("a")]}, "train.jsonl:2: sample a: id: expected an id of its own"),
    ],
)  # fmt: skip
def test_splits_that_training_would_not_find(files, found, tmp_path, model, capsys):
    for name, rows in files.items():
        write_jsonl(tmp_path / name, rows)
    status, printed = run(capsys, tmp_path, "--model_name_or_path", model, "--all")
    assert status == 2
    assert found in printed
    assert "1 fault(s)" in printed


def test_a_file_that_cannot_be_read(good, model, capsys):
    (good / "folder_test.jsonl").mkdir()
    status, printed = run(capsys, good, "--model_name_or_path", model)
    assert status == 2
    assert f"{good}/folder_test.jsonl: expected a file with rows, found a directory" in printed


def test_rows_with_a_field_split(tmp_path, model, capsys):
    write_jsonl(tmp_path / "rows.jsonl", [row(1, split="train"), row(1, split="val"), row(2, split="train")])
    status, report = run_json(capsys, tmp_path, "--model_name_or_path", model)
    assert status == 0
    assert {name: figures["samples"] for name, figures in report["splits"].items()} == {"train": 2, "val": 1}


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["gone"], "gone: expected a folder"),
        (["empty"], "empty: expected files with rows (.jsonl, .parquet, .csv, .tsv, .json) in this folder, found none"),
        (["empty", "--num_crops", "17"], "--num_crops"),
        (["empty", "--max_length", "0"], "--max_length 0: expected at least 1 token"),
        (["empty", "--colour"], "--colour"),
        (["empty", "--convert", "empty"], "--convert empty: expected a folder that does not exist yet"),
    ],
)
def test_a_bad_call_is_one_line(flags, found, tmp_path, model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert validate.main([*flags, "--model_name_or_path", model]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert found in printed.err
    assert len(printed.err.splitlines()) == 1


def png_uri(seed: int) -> str:
    buffer = io.BytesIO()
    tiny.picture(30, 30, seed).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def say(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


LLAVA = [
    {"id": "l1", "image": "coco/a.jpg", "conversations": say("<image>\nWhat is it?", "A cat", "Sure?", "yes")},
    {"id": "l1", "image": ["coco/a.jpg", "b.jpg"], "conversations": say("Is <image> before <image>?", "no")},
    {"id": 3, "conversations": say("Hello", "Hi")},
]
LLAVA_TEXTS = [
    ["<|image_1|>\nWhat is it?", "A cat", "Sure?", "yes"],
    ["Is <|image_1|> before <|image_2|>?", "no"],
    ["Hello", "Hi"],
]
SHAREGPT = [
    {
        "system": "Be brief.",
        "images": ["coco/a.jpg", "b.jpg"],
        "conversations": say("What is it? <image>", "A cat", "And this?\n<image>", "A dog"),
    },
    {"conversations": [{"from": "system", "value": "Be kind."}, *say("Hello", "Hi")]},
]
SHAREGPT_TEXTS = [
    ["Be brief.\n\nWhat is it? <|image_1|>", "A cat", "And this?\n<|image_2|>", "A dog"],
    ["Be kind.\n\nHello", "Hi"],
]
OPENAI = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Compare "},
                    {"type": "image_url", "image_url": {"url": png_uri(5)}},
                    {"type": "text", "text": "with "},
                    {"type": "image", "image": "coco/a.jpg"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "The same"}]},
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "file://FOLDER/images/b%20b.jpg"}}],
            },
            {"role": "assistant", "content": "A dog"},
        ]
    },
    {"messages": [{"role": "user", "content": "Write <image> in HTML"}, {"role": "assistant", "content": "<img>"}]},
]
OPENAI[1]["messages"][0]["content"] = [
    {"type": "text", "text": "Write <image> in HTML"},
    {"type": "image_url", "image_url": {"url": png_uri(5)}},
]
OPENAI_TEXTS = [
    ["Be brief.\n\nCompare <|image_1|>\nwith <|image_2|>\n", "The same", "<|image_3|>\n", "A dog"],
    ["Write <image> in HTML<|image_1|>\n", "<img>"],
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("name", "rows", "texts", "ids"),
    [
        ("llava_train.json", LLAVA, LLAVA_TEXTS, ["l1", "l1-LINE", "3"]),
        ("all_chats.json", SHAREGPT, SHAREGPT_TEXTS, None),
        ("chats.jsonl", SHAREGPT, SHAREGPT_TEXTS, ["chats-1", "chats-2"]),
        ("train.jsonl", OPENAI, OPENAI_TEXTS, ["train-1", "train-2"]),
    ],
)
def test_other_formats_become_the_native_form(name, rows, texts, ids, indent, tmp_path, model, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    save(source, "coco/a.jpg", size=(90, 30))
    save(source, "images/b.jpg", "images/b b.jpg")
    rows = json.loads(json.dumps(rows).replace("FOLDER", str(source)))
    if name.endswith("json"):
        (source / name).write_text(json.dumps(rows, indent=indent))
    else:
        write_jsonl(source / name, rows)
    flags = ["--model_name_or_path", model, "--num_crops", 4]
    status, report = run_json(capsys, source, *flags, "--convert", out)
    assert (status, report["faults"]) == (0, [])
    assert "expected a split test" in report["remarks"][0]  # not yet a fault
    assert [path.name for path in out.iterdir() if path.suffix] == ["converted_train.jsonl"]

    conversations = [from_converted(row) for row in read_jsonl(out / "converted_train.jsonl")]
    messages = [to_messages(item, [turn.answers[0] for turn in item.turns]) for item in conversations]
    assert [[message["content"] for message in turns] for turns in messages] == texts
    if ids:
        found = [conversation.id for conversation in conversations]
        assert found == [item.replace("LINE", "1" if indent is None else found[1][3:]) for item in ids]
    # a clean folder of the same figures, once there is something to answer
    write_jsonl(out / "test.jsonl", [row("x")])
    status, converted = run_json(capsys, out, *flags)
    assert status == 0
    assert converted["splits"]["train"] == report["splits"]["train"]
    for conversation in conversations:
        encode_conversation(conversation, tiny.processor())


def test_the_images_of_a_converted_folder(tmp_path, model, capsys):
    source, out = tmp_path / "source", tmp_path / "deep" / "out"
    save(source, "images/a.jpg", "coco/a.jpg")
    shutil.copy(source / "coco/a.jpg", source / "a.jpg")
    rows = [
        {"image": [name, name], "conversations": say("<image><image>", "A cat")}
        for name in ("images/a.jpg", "coco/a.jpg", "a.jpg")
    ]
    write_jsonl(source / "rows.jsonl", [*rows, {"image": png_uri(1), "conversations": say("<image>", "A dog")}])
    flags = ["--model_name_or_path", model, "--convert", out]
    assert run(capsys, source, *flags)[0] == 0
    rows = read_jsonl(out / "converted_train.jsonl")
    written = [row["conversations"][0]["images"] for row in rows]
    for name, paths in zip(("images/a.jpg", "coco/a.jpg", "a.jpg"), written, strict=False):
        assert {Path(path).read_bytes() for path in paths} == {(source / name).read_bytes()}
    assert written[1][0] == str(out / "images" / "coco" / "a.jpg")
    assert len({path for paths in written for path in paths}) == 4
    assert Image.open(written[3][0]).size == (30, 30)
    # readable by others, as any folder, and never written again
    assert out.stat().st_mode & 0o777 == source.stat().st_mode & 0o777
    before = sorted(out.rglob("*"))
    assert validate.main([str(source), *map(str, flags)]) == 2
    assert "expected a folder that does not exist yet" in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before


def test_a_native_folder_stays_what_it_is(good, model, tmp_path_factory, capsys):
    out = tmp_path_factory.mktemp("native") / "out"
    assert run(capsys, good, "--model_name_or_path", model, "--convert", out)[0] == 0
    for split in ("train", "val"):
        original = [json.loads(line) for line in (good / f"mine_{split}.jsonl").read_text().splitlines()]
        assert [json.loads(line) for line in (out / f"converted_{split}.jsonl").read_text().splitlines()] == original
    assert (out / "images/sub/b.jpg").samefile(good / "images/sub/b.jpg")


def test_nothing_is_left_of_a_conversion_that_fails(good, model, tmp_path_factory, monkeypatch, capsys):
    out = tmp_path_factory.mktemp("failed") / "out"
    flags = [str(good), "--model_name_or_path", model, "--convert", str(out)]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(formats.os, "link", full)
        patch.setattr(formats.shutil, "copy2", full)
        assert validate.main(flags) == 2
    assert f"--convert {out}: expected a folder to write to, found: No space left" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []
    write_jsonl(good / "mine_val.jsonl", [row("v1", assistant="")])
    assert validate.main(flags) == 2
    assert "nothing written" in capsys.readouterr().out
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ({"id": 1, "image": "a.png", "conversations": say("What?", "cat")}, "expected 1 placeholder(s) <image> for 1 image(s), found 0"),
        ({"id": 1, "image": "a.png", "conversations": say("<image><image>", "cat")}, "for 1 image(s), found 2"),
        ({"id": 1, "conversations": say("<image>", "cat")}, "expected 0 placeholder(s) <image> for 0 image(s), found 1"),
        ({"id": 1, "image": "a.png", "conversations": say("What?", "<image>")}, "expected image tags in user texts only"),
        ({"id": 1, "conversations": say("What?")}, "conversations: expected an answer to the last message of the user, found none"),
        ({"id": 1, "conversations": [{"from": "gpt", "value": "a"}]}, "conversations[0]: expected a message of the user, found one of gpt"),
        ({"id": 1, "conversations": say("q", "a") + say("q", "a")[::-1]}, "conversations[2]: expected a message of the user, found one of gpt"),
        ({"id": 1, "conversations": [{"from": "tool", "value": "a"}]}, "conversations[0].from: expected 'system', 'human', 'user', 'gpt' or 'assistant', found 'tool'"),
        ({"id": 1, "conversations": [{"from": "human", "value": None}]}, "conversations[0].value: expected text, found null"),
        ({"id": 1, "messages": "hello"}, "messages: expected a list, found 'hello'"),
        ({"id": 1, "messages": []}, "sample 1: messages: expected a list with at least 1 item(s), found 0"),
        ({"id": 1, "image": 3, "conversations": say("<image>", "a")}, "image: expected a picture"),
        ({"id": 1, "image": "https://x.org/a.png", "conversations": say("<image>", "a")}, "download what is on the web"),
        ({"id": 1, "image": "data:image/png;base64,%%", "conversations": say("<image>", "a")}, "expected data:image/TYPE;base64"),
        ({"id": 1, "image": "data:image/png;base64,AAAA", "conversations": say("<image>", "a")}, ".png: expected a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM image, found"),
        ({"id": 1, "image": "../a.png", "conversations": say("<image>", "a")}, "expected an image path inside"),
        ({"id": 1, "image": "b.png", "conversations": say("<image>", "a")}, "b.png: expected an image file, found no such file"),
        ({"id": 1, "messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0].type: expected 'text', 'image_url', 'image' or 'video', found 'audio'"),
    ],
)  # fmt: skip
def test_faults_of_other_formats(bad, found, tmp_path, model, capsys):
    save(tmp_path, "a.png")
    fine = {"id": "fine", "image": "a.png", "conversations": say("<image>", "A cat")}
    for name in ("x.json", "x.jsonl"):
        if name == "x.json":
            (tmp_path / name).write_text("[\n" + ",\n".join(map(json.dumps, [fine, bad, fine])) + "\n]\n")
        else:
            (tmp_path / "x.json").unlink()
            write_jsonl(tmp_path / name, [{}, fine, bad][1:])
        status, printed = run(capsys, tmp_path, "--model_name_or_path", model, "--all")
        line = 3 if name == "x.json" else 2
        assert status == 2
        [fault] = [text for text in printed.splitlines() if text.startswith(f"{tmp_path}/")]
        assert fault.startswith(f"{tmp_path}/{name}:{line}: sample 1")
        assert found in fault


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}', "x.json:1: expected a list of rows, found '{\"a\": 1}'"),
        ('[{"messages": 1},\n {"a" 1}]', "x.json:2: expected a JSON object, found Expecting ':' delimiter at column 7"),
        ("[1,\n\n2", "x.json:3: expected a JSON object, found"),
        ("", "x.json:1: expected a list of rows, found ''"),
        ("[]", "x.json: expected at least one row, found none"),
    ],
)
def test_broken_json_lists(text, found, tmp_path, model, capsys):
    (tmp_path / "x.json").write_text(text)
    status, printed = run(capsys, tmp_path, "--model_name_or_path", model, "--all")
    assert status == 2
    assert found in printed


def test_a_hundred_thousand_lines_in_less_than_a_minute(tmp_path, capsys, model):
    save(tmp_path / "images", *(f"{number}.png" for number in range(20)), size=(30, 30))
    for name, count, first in (("train", 99_000, 0), ("test", 1_000, 15)):
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            for number in range(count):
                image = first + number % (5 if first else 15)
                line = row(number, [f"{image}.png"], user="Which?", assistant=str(number))
                file.write(json.dumps(line) + "\n")
    # CPU time of all threads: the machine may be busy with something else
    start = time.process_time()
    flags = ["--model_name_or_path", model, "--num_crops", 4, "--images", "headers"]
    status, report = run_json(capsys, tmp_path, *flags)
    assert time.process_time() - start < 60
    assert status == 0
    assert {name: figures["samples"] for name, figures in report["splits"].items()} == {"train": 99_000, "test": 1_000}


# ---- the same as in training


def test_an_answer_with_leading_blanks_is_counted_as_it_is_trained(tmp_path, model, capsys):
    # Alone the first is the longest; trained, <|assistant|> takes its blanks.
    answers = ["        a", "b c d e", "f"]
    write_jsonl(tmp_path / "train.jsonl", [row(1, assistant=answers)])
    write_jsonl(tmp_path / "test.jsonl", [row(1)])
    status, report = run_json(capsys, tmp_path, "--model_name_or_path", model)
    assert status == 0
    (conversation,) = map(from_converted, read_splits(tmp_path)[0])
    trained = {
        len(encode_conversation(conversation, tiny.processor(), epoch=epoch)["input_ids"]) for epoch in range(30)
    }
    assert len(trained) > 1
    assert report["splits"]["train"]["tokens_per_epoch"] == max(trained)


@pytest.mark.parametrize(("width", "status"), [(9_500, 0), (18_001, 2)])
def test_training_and_the_checker_have_one_limit_of_pixels(width, status, tmp_path, model, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "large.png").write_bytes(png_header(width, 10_000))
    write_jsonl(tmp_path / "train.jsonl", [row(1, ["large.png"])])
    write_jsonl(tmp_path / "test.jsonl", [row(1)])
    flags = ["--model_name_or_path", model, "--images", "headers"]
    assert run(capsys, tmp_path, *flags)[0] == status
    (conversation,) = map(from_converted, read_splits(tmp_path)[0])
    if status:
        with pytest.raises(InputError, match=rf"180000000 pixels \(--max_image_pixels\), found {width} x 10000"):
            image_sizes(conversation)
    else:
        assert image_sizes(conversation) == [(width, 10_000)]
    # and both can be told another
    assert run(capsys, tmp_path, *flags, "--max_image_pixels", width * 10_000)[0] == 0
    status, printed = run(capsys, tmp_path, *flags, "--max_image_pixels", width * 10_000 - 1)
    assert status == 2
    assert f"found {width} x 10000" in printed


@pytest.mark.parametrize(("task", "num_crops"), [("docvqa", 16), ("hateful_memes", 16), ("nlvr2", 16), ("ucf101", 4)])
def test_a_task_s_own_rows_are_counted_as_its_script_trains_them(task, num_crops, tmp_path, model, capsys):
    write_folder(tmp_path, task, [good_row(task, number) for number in range(4)])
    # Its own pictures for the rows to answer: the bytes decide what leaks.
    flags = ["--task", task, "--model_name_or_path", model, "--all"]
    report = run_json(capsys, tmp_path, *flags)[1]
    assert all("images that train does not hold" in fault["message"] for fault in report["faults"])
    assert report["num_crops"] == num_crops
    script = validate.load_script(task)
    rows, _ = script.load_splits(
        SimpleNamespace(data_dir=str(tmp_path), eval_split=None, full_train=False, do_train=True)
    )
    conversations = [script.to_conversation(row) for row in rows]
    processor = tiny.processor(num_crops)
    lengths = [len(encode_conversation(conversation, processor)["input_ids"]) for conversation in conversations]
    figures = report["splits"]["train"]
    assert figures["samples"] == 4
    assert figures["tokens_per_sample"]["max"] == max(
        count_tokens(conversation, processor) for conversation in conversations
    )
    assert figures["tokens_per_epoch"] >= sum(lengths)
    assert run_json(capsys, tmp_path, *flags, "--num_crops", 2)[1]["num_crops"] == 2


def test_a_script_of_one_s_own_checks_its_rows(tmp_path, model, capsys):
    script = tmp_path / "finetune_mine.py"
    script.write_text(
        "from finetuning.data.conversation import Conversation, Turn\n"
        "from finetuning.data.schemas import RowModel, Text, parse_row\n"
        "NUM_CROPS = 3\n"
        "class Riddle(RowModel):\n"
        "    question: Text\n"
        "def to_conversation(row):\n"
        "    riddle = parse_row(row, Riddle)\n"
        "    return Conversation(row['name'], [Turn(riddle.question, ['yes'])])\n"
    )
    data = tmp_path / "data"
    data.mkdir()
    write_jsonl(data / "train.jsonl", [{"name": "a", "question": "q"}, {"name": "b", "question": None}])
    write_jsonl(data / "test.jsonl", [{"name": "c", "question": "q"}, {"name": 3, "question": "q"}])
    status, report = run_json(capsys, data, "--task", script, "--model_name_or_path", model, "--all")
    assert (status, report["num_crops"]) == (2, 3)
    assert [fault["message"] for fault in report["faults"]] == [
        "Conversation.id: expected text, found 3",
        "question: expected text, found null",
    ]


def test_splits_that_training_does_not_read_can_be_left_out(tmp_path, model, capsys):
    write_folder(tmp_path, "hateful_memes", [good_row("hateful_memes", number) for number in range(4)])
    unlabelled = [{"id": 1, "img": "img/0.png", "text": "so funny"}]
    write_jsonl(tmp_path / "test.jsonl", unlabelled)
    flags = ["--task", "hateful_memes", "--model_name_or_path", model, "--all"]
    assert "test.jsonl:1: sample 1: label: expected this field, found id, img, text" in run(capsys, tmp_path, *flags)[1]
    report = run_json(capsys, tmp_path, *flags, "--splits", "train")[1]
    assert (report["faults"], list(report["splits"])) == ([], ["train"])
    assert "expected the split trian, found none" in run(capsys, tmp_path, *flags, "--splits", "trian")[1]


def test_rows_of_a_task_without_the_flag_that_reads_them(tmp_path, model, capsys):
    write_folder(tmp_path, "docvqa", [good_row("docvqa", number) for number in range(2)])
    status, printed = run(capsys, tmp_path, "--model_name_or_path", model)
    assert status == 2
    assert "rows.jsonl:1: sample page-0: expected the field" in printed
    assert "--task reads rows of a task's own form" in printed


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (
            ["--task", "vqa"],
            "--task vqa: expected docvqa, hateful_memes, nlvr2, ucf101, own_data or the path of a script",
        ),
        (["--task", "gone.py"], "--task gone.py: expected docvqa"),
        (["--task", "docvqa", "--convert", "out"], "--convert and --task: expected one of them"),
        (["--max_image_pixels", "0"], "--max_image_pixels 0: expected at least 1 pixel"),
    ],
)
def test_a_bad_task_is_one_line(flags, found, good, model, capsys):
    assert validate.main([str(good), *flags, "--model_name_or_path", model]) == 2
    assert capsys.readouterr().err.startswith(f"error: {found}")
