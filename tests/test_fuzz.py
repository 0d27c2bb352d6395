"""What strangers write reaches the parsers: any input is read or refused with an InputError, and no path leaves its folder.

pytest tests/test_fuzz.py --hypothesis-profile=long --hypothesis-show-statistics    # 2,000 cases each
"""

import functools
import io
import json
import os
import tarfile
import tempfile
from pathlib import Path

import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_run import leave, report, rows

from convert_ucf101 import find_clips, list_archive
from finetuning.data.conversation import Conversation, Turn, check_conversation, control_tokens
from finetuning.data.encoding import encode_conversation
from finetuning.data.formats import Fault, Sample, read_samples
from finetuning.data.reading import iterate_rows, read_jsonl, resolve_images
from finetuning.data.schemas import ConvertedRow, parse_row
from finetuning.errors import InputError
from finetuning.results.page import DATA

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
# Pieces that mean something to one of the parsers, so that nonsense gets past the first check.
PIECES = st.sampled_from(
    ["<|image_1|>", "<|image_2|>", "<|image_0|>", "<|image_99999999999999999999|>", "<|end|>", "<|user|>", "<image>", "<s>", "\n", "ab", "\0", "é", "日", "😀"]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=5), max_size=6).map("".join)
PATHS = st.lists(
    st.sampled_from(["..", ".", "/", "a", "link", "images", "~", "\0", "\\", "a b"]) | st.text(max_size=4), max_size=5
).map("/".join)
FIELDS = st.sampled_from(
    ["id", "image", "images", "conversations", "messages", "user", "assistant", "from", "value", "role", "content", "split", "type", "text", "image_url", "url", "system"]
)  # fmt: skip
ROWS = st.recursive(
    SCALARS | TEXTS | PATHS | st.sampled_from(["human", "gpt", "user", "assistant", "data:image/png;base64,AAAA", "file:///etc/passwd"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=5),
    max_leaves=15,
)  # fmt: skip


def outcome(function, *arguments):
    """What a function returns, and None; or None, and what its InputError says."""
    try:
        return function(*arguments), None
    except InputError as error:
        return None, str(error)


@functools.cache
def processor():
    return tiny.processor(num_crops=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data folder with a way out of it, a link."""
    path = tmp_path_factory.mktemp("fuzz") / "data"
    (path / "images").mkdir(parents=True)
    (path / "link").symlink_to(path.parent)
    return path


@given(
    st.binary(max_size=200)
    | JSON.map(lambda value: json.dumps(value).encode())
    | TEXTS.map(lambda text: text.encode(errors="surrogatepass"))
)
@example(b"\xff")
@example(b"[" * 100_000)
def test_a_jsonl_file(folder, content):
    path = folder.parent / "rows.jsonl"
    path.write_bytes(content)
    rows, refused = outcome(lambda: read_jsonl(path))
    faults = [row for _, row in iterate_rows(path) if isinstance(row, InputError)]
    if refused is None:
        assert not faults
        assert all(isinstance(row, dict) for row in rows)
        assert all(row.where.startswith(f"{path}:") for row in rows)
    else:
        assert str(path) in refused
        assert len(refused.splitlines()) == 1


@given(PATHS)
@example("link/secret.png")
def test_an_image_path(folder, path):
    for row in ({"image": path}, {"images": [path]}, {"conversations": [{"images": [path]}]}):
        found, refused = outcome(resolve_images, row, folder)
        if refused:
            continue
        whole = next(
            value
            for value in (
                found.get("image"),
                *found.get("images", []),
                *(turn["images"][0] for turn in found.get("conversations", [])),
            )
            if value
        )
        assert os.path.realpath(whole).startswith(os.path.realpath(folder) + os.sep)


@given(ROWS)
def test_a_row_of_any_format(folder, row):
    path = folder.parent / "llava_train.json"
    try:
        path.write_text(json.dumps([row]), encoding="utf-8")
    except UnicodeEncodeError:
        return
    (found,) = read_samples([path])
    assert isinstance(found, (Fault, Sample))
    if isinstance(row, dict):
        _, refused = outcome(parse_row, row, ConvertedRow)
        assert refused is None or (refused.isprintable() and len(refused) < 1000)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.integers(0, 2))
def test_a_conversation(turns, images):
    pictures = [tiny.picture(30, 20, seed=number) for number in range(images)]
    conversation = Conversation("x", [Turn(user, [answer]) for user, answer in turns])
    conversation.turns[0].images = pictures
    encoded, refused = outcome(encode_conversation, conversation, processor())
    if refused:
        assert refused.startswith("sample x")
        return
    # what is accepted holds one span of labels for each answer, and as many image tokens as features
    ids, labels = encoded["input_ids"], encoded["labels"]
    end = processor().tokenizer.convert_tokens_to_ids("<|end|>")
    assert [token for token, label in zip(ids, labels, strict=True) if label == end] == [end] * len(turns)
    assert labels[-1] == processor().tokenizer.eos_token_id
    calculate = processor().image_processor.calc_num_image_tokens_from_image_size
    assert ids.count(processor().image_token_id) >= sum(calculate(*picture.size) for picture in pictures)
    check_conversation(conversation, control_tokens(processor().tokenizer))


@given(TEXTS, st.integers(0, 3))
def test_a_text_for_the_processor(text, images):
    pictures = [tiny.picture(30, 20, seed=number) for number in range(images)]
    try:
        inputs = processor()(text, pictures or None)
    except ValueError:
        return
    assert len(inputs.get("image_sizes", [])) >= images


@given(
    st.lists(
        st.tuples(
            PATHS,
            st.sampled_from(
                [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
            ),
        ),
        max_size=4,
    ),
    st.integers(0, 2_000),
)
def test_an_archive(folder, members, cut):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            try:
                tar.addfile(info, io.BytesIO())
            except (ValueError, UnicodeError):
                return
    path = folder.parent / "clips.tar.gz"
    path.write_bytes(buffer.getvalue()[: cut or None])
    clips, refused = outcome(lambda: find_clips(list_archive(path), path))
    if refused:
        return
    for clip in clips:
        assert ".." not in Path(clip.target).parts
        assert not Path(clip.target).is_absolute()


# Each example makes two pages.
@settings(max_examples=10)
@given(TEXTS | st.text())
def test_a_text_on_the_report_page(text):
    tags = []
    for value in (text, ""):
        with tempfile.TemporaryDirectory() as folder:
            found = rows(1, id=value, question=value, references=[value])
            leave(Path(folder), found, {"before": value, "after": value})
            html = report(Path(folder), found, title=value)
            # in the data no tag begins, whatever it holds
            assert "<" not in DATA.search(html)[1]
            tags.append(DATA.sub("", html).count("<"))
    # a text adds no tag
    assert tags[0] == tags[1]
