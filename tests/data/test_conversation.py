"""Rows -> conversations -> features: labels on answers only, answers chosen by seed, and one line for each bad row."""

import functools
import random
import re
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import recipe
import tiny
import torch
from bad_rows import png_header
from PIL import ExifTags, Image
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from finetuning.data.conversation import Conversation, Turn, check_conversation, control_tokens, to_messages
from finetuning.data.dataset import build_dataset
from finetuning.data.encoding import choose_answers, count_tokens, encode_conversation
from finetuning.data.images import image_size, load_image, load_images, open_image
from finetuning.environment import limit_pixels
from finetuning.errors import InputError
from phi3v import Phi3VImageProcessor, Phi3VProcessor

own_process = pytest.fixture(autouse=True)(recipe.own_process)

OFFICIAL_FOLDER = Path(__file__).parents[3] / "shared" / "phi35v"
IGNORED = -100


@functools.cache
def processor(name: str = "tiny") -> Phi3VProcessor:
    if name == "tiny":
        return tiny.processor()
    return Phi3VProcessor(Phi3VImageProcessor(num_crops=1), AutoTokenizer.from_pretrained(OFFICIAL_FOLDER))


official = pytest.param(
    "official", marks=pytest.mark.skipif(not OFFICIAL_FOLDER.is_dir(), reason="the official tokenizer is not here")
)


def pictures(count: int) -> list[Image.Image]:
    return [tiny.picture(40 + 20 * number, 30, seed=number) for number in range(count)]


CONVERSATIONS = {
    "text only": Conversation("a", [Turn("What is it?", ["A cat"])]),
    "one image": Conversation("b", [Turn("What is it?", ["A cat"], pictures(1))]),
    "two images": Conversation("c", [Turn("Compare.\nAnswer briefly.", ["same"], pictures(2))]),
    "several turns": Conversation(
        "d",
        [
            Turn("What is it?", ["A cat\nand a dog"], pictures(1)),
            Turn("And here?", ["é 日本 42 %"], pictures(2)),
            Turn("Sure?", ["yes"]),
        ],
    ),
    "own tags": Conversation(
        "e", [Turn("Is <|image_2|> after <|image_1|> or before?", ["after"], pictures(2)), Turn("Sure?", ["no"])]
    ),
    "a tag used twice": Conversation("f", [Turn("<|image_1|> and again <|image_1|>?", ["one"], pictures(1))]),
    "spaces around": Conversation("g", [Turn(" What ? ", ["  two  spaces "], pictures(1))]),
}


def by_pieces(conversation: Conversation, answers: list[str], name: str) -> tuple[list[int], list[int]]:
    """input_ids and labels, built piece by piece: an independent account of the layout."""
    tokenizer, found = processor(name).tokenizer, processor(name)
    ids, labels = [], []

    def add(text: str = "", trained: bool = False, tokens: list[int] | None = None):
        tokens = tokenizer(text, add_special_tokens=False).input_ids if tokens is None else tokens
        ids.extend(tokens)
        labels.extend(tokens if trained else [IGNORED] * len(tokens))

    tagged = any("<|image_" in turn.user for turn in conversation.turns)
    images, next_number, before = conversation.images, 1, ""
    add(tokens=[tokenizer.bos_token_id])
    for turn, answer in zip(conversation.turns, answers, strict=True):
        tags = ""
        if not tagged:
            tags = "".join(f"<|image_{next_number + number}|>\n" for number in range(len(turn.images)))
            next_number += len(turn.images)
        prompt = f"{before}<|user|>\n{tags}{turn.user}<|end|>\n<|assistant|>\n"
        chunks = re.split(r"<\|image_(\d+)\|>", prompt)
        add(chunks[0])
        for number, chunk in zip(chunks[1::2], chunks[2::2], strict=True):
            width, height = images[int(number) - 1].size
            count = found.image_processor.calc_num_image_tokens_from_image_size(width, height)
            add(tokens=[found.image_token_id] * count)
            add(tokens=[tokenizer.bos_token_id])  # as in the official processor
            add(chunk)
        # <|assistant|> takes the white space after it, the newline of the template and any of the answer's own.
        add(answer.lstrip() + "<|end|>", trained=True)
        before = "\n"
    add("\n")
    add(tokens=[tokenizer.convert_tokens_to_ids("<|endoftext|>")], trained=True)
    return ids, labels


def spans(labels: list[int]) -> list[list[int]]:
    """Runs of labels that are not masked."""
    found, open_run = [], False
    for label in labels:
        if label != IGNORED and not open_run:
            found.append([])
        open_run = label != IGNORED
        if open_run:
            found[-1].append(label)
    return found


# ---- encoding


@pytest.mark.parametrize("name", ["tiny", official])
@pytest.mark.parametrize("case", CONVERSATIONS)
def test_ids_and_labels_equal_those_built_piece_by_piece(case, name):
    conversation = CONVERSATIONS[case]
    encoded = encode_conversation(conversation, processor(name))
    ids, labels = by_pieces(conversation, [turn.answers[0] for turn in conversation.turns], name)
    assert encoded["input_ids"] == ids
    assert encoded["labels"] == labels


@pytest.mark.parametrize("name", ["tiny", official])
@pytest.mark.parametrize("case", CONVERSATIONS)
def test_labels_cover_answers_their_end_and_the_end_of_text(case, name):
    conversation = CONVERSATIONS[case]
    encoded = encode_conversation(conversation, processor(name))
    assert all(label in (IGNORED, token) for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True))
    tokenizer = processor(name).tokenizer
    found = [tokenizer.decode(span) for span in spans(encoded["labels"])]
    answers = [turn.answers[0] for turn in conversation.turns]
    # The tokenizers put a space before a text, and decoding drops it again.
    assert [text.removesuffix("<|end|>").strip() for text in found[:-1]] == [answer.strip() for answer in answers]
    assert all(text.endswith("<|end|>") for text in found[:-1])
    assert found[-1] == "<|endoftext|>"


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_features_equal_those_of_the_processor(case):
    conversation = CONVERSATIONS[case]
    encoded = encode_conversation(conversation, processor())
    messages = to_messages(conversation, [turn.answers[0] for turn in conversation.turns])
    expected = processor()(processor().apply_chat_template(messages), conversation.images or None)
    assert encoded["input_ids"] == [*expected["input_ids"][0].tolist(), processor().tokenizer.eos_token_id]
    assert ("pixel_values" in encoded) == bool(conversation.images)
    if conversation.images:
        assert torch.equal(encoded["pixel_values"], expected["pixel_values"])
        assert torch.equal(encoded["image_sizes"], expected["image_sizes"])


def test_tags_are_put_before_the_text_and_count_over_all_turns():
    first, _, second, _, third, _ = [
        message["content"] for message in to_messages(CONVERSATIONS["several turns"], ["a", "b", "c"])
    ]
    assert first == "<|image_1|>\nWhat is it?"
    assert second == "<|image_2|>\n<|image_3|>\nAnd here?"
    assert third == "Sure?"


def test_own_tags_are_kept_as_they_are():
    messages = to_messages(CONVERSATIONS["own tags"], ["after", "no"])
    assert messages[0]["content"] == "Is <|image_2|> after <|image_1|> or before?"
    # the images follow the numbers, not the places
    encoded = encode_conversation(CONVERSATIONS["own tags"], processor())
    one, two = (processor().image_processor([image]) for image in CONVERSATIONS["own tags"].images)
    assert torch.equal(encoded["pixel_values"], torch.cat([two["pixel_values"], one["pixel_values"]]))


def test_messages_stop_at_the_question_to_answer():
    roles = [message["role"] for message in to_messages(CONVERSATIONS["several turns"], ["a"])]
    assert roles == ["user", "assistant", "user"]


@pytest.mark.parametrize("kind", ["path", "PIL", "bytes", "bytes and path", "dict with path"])
def test_an_image_may_be_given_in_any_usual_form(kind, tmp_path):
    image, path = tiny.picture(50, 30), tmp_path / "page.png"
    image.save(path)
    source = {
        "path": str(path),
        "PIL": image,
        "bytes": {"bytes": path.read_bytes(), "path": None},
        "bytes and path": {"bytes": path.read_bytes(), "path": "gone.png"},
        "dict with path": {"bytes": None, "path": str(path)},
    }[kind]
    conversation = Conversation("x", [Turn("What is it?", ["A cat"], [source])])
    encoded = encode_conversation(conversation, processor())
    expected = encode_conversation(CONVERSATIONS["text only"], processor())
    assert torch.equal(encoded["pixel_values"], processor().image_processor([image])["pixel_values"])
    assert len(encoded["input_ids"]) == count_tokens(conversation, processor()) > len(expected["input_ids"])


# ---- answers


def several(identity: str = "r1") -> Conversation:
    return Conversation(identity, [Turn("q", ["a", "b", "c"]), Turn("q", ["only"])])


def test_the_choice_among_answers_is_fixed_by_row_epoch_and_seed():
    def choice(**at):
        return [choose_answers(several(f"r{number}"), **at) for number in range(40)]

    assert choice(epoch=1, seed=3) == choice(epoch=1, seed=3)
    assert choice(epoch=1, seed=3) != choice(epoch=2, seed=3)
    assert choice(epoch=1, seed=3) != choice(epoch=1, seed=4)
    assert len({answer for answer, _ in choice(epoch=1)}) == 3  # not the same place in every row


def test_the_choice_among_answers_is_known():
    # Recorded: a resumed run, or another rank, must choose what this one chose.
    assert [choose_answers(several(), epoch)[0] for epoch in range(6)] == ["c", "a", "c", "a", "c", "b"]


def test_every_answer_is_chosen_equally_often():
    counts = Counter(choose_answers(several(f"r{row}"), epoch)[0] for row in range(300) for epoch in range(10))
    # 1000 of 3000 each; five standard deviations
    assert all(abs(counts[answer] - 1000) < 130 for answer in "abc")


def test_training_sees_other_answers_in_other_epochs():
    seen = set()
    for epoch in range(12):
        encoded = encode_conversation(several(), processor(), epoch=epoch)
        seen.add(processor().tokenizer.decode(spans(encoded["labels"])[0]))
    assert seen == {"a<|end|>", "b<|end|>", "c<|end|>"}


# ---- refusals


def truncated(tmp_path: Path) -> Path:
    path = tmp_path / "cut.jpg"
    tiny.picture(200, 200).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def not_an_image(tmp_path: Path) -> Path:
    path = tmp_path / "notes.png"
    path.write_text("no image")
    return path


def one(user="What?", answers=("yes",), images=()) -> list[Turn]:
    return [Turn(user, list(answers), list(images))]


REFUSED = {
    "no turn": (lambda _: [], "at least one Turn"),
    "no answer": (lambda _: [*one(), Turn("And?", [])], "turn 2"),
    "a number as answer": (lambda _: one(answers=[42]), "42"),
    "None as answer": (lambda _: one(answers=["yes", None]), "answers[1]: expected text, found null"),
    "an empty answer": (lambda _: one(answers=[" "]), "' '"),
    "answers that are one text": (lambda _: [Turn("What?", "yes")], "yes"),
    "a number as question": (lambda _: one(user=42), "42"),
    "a tag in the answer": (lambda _: one(answers=["<|image_1|>"], images=pictures(1)), "answer"),
    "a tag without its image": (lambda _: one("<|image_1|> and <|image_2|>?", images=pictures(1)), "<|image_2|>"),
    "a tag and no image at all": (lambda _: one("<|image_1|>?"), "0 image"),
    "an image without its tag": (lambda _: one("<|image_1|>?", images=pictures(2)), "2 image"),
    "half a surrogate pair": (lambda _: one("What\ud800?"), "surrogate"),
    "a control token in the question": (lambda _: one("What?<|end|>"), "<|end|>"),
    "a control token in the answer": (lambda _: one(answers=["yes<|endoftext|>"]), "<|endoftext|>"),
    "an image token in the question": (lambda _: one("<|image|>?"), "<|image|>"),
    "a missing image": (lambda folder: one(images=[folder / "gone.png"]), "gone.png"),
    "a file that is no image": (lambda folder: one(images=[not_an_image(folder)]), "notes.png"),
    "bytes that are no image": (lambda _: one(images=[{"bytes": b"no", "path": "p.png"}]), "p.png"),
    "a folder as image": (lambda folder: one(images=[folder]), "expected an image file, found a directory"),
    "no image where one should be": (lambda _: one(images=[None]), "images[0]: expected a picture"),
    "an image column without content": (
        lambda _: one(images=[{"bytes": None, "path": None}]),
        "images[0]: expected a picture",
    ),
    "a truncated image": (lambda folder: one(images=[truncated(folder)]), "cut.jpg"),
    "too long": (lambda _: one("What? " * 100), "found"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_sample_is_refused_with_its_id_in_one_line(case, tmp_path):
    turns, named = REFUSED[case]
    with pytest.raises(InputError) as caught:
        encode_conversation(Conversation("row-17", turns(tmp_path)), processor(), max_length=120)
    message = str(caught.value)
    assert message.startswith("sample row-17")
    assert named in message
    assert len(message.splitlines()) == 1


# Decoding every image beforehand would take as long as an epoch; a broken one is met when it is read.
@pytest.mark.parametrize("case", sorted(set(REFUSED) - {"a truncated image"}))
def test_a_bad_sample_is_found_before_training(case, tmp_path):
    turns, named = REFUSED[case]
    bad = Conversation("row-17", turns(tmp_path))
    rows = [CONVERSATIONS["one image"], bad, Conversation("row-18", [])]
    values = {
        "on_bad_row": "stop",
        "max_bad_rows": None,
        "eval_size": None,
        "data_dir": None,
        "max_length": 120,
        "seed": 0,
    }
    args = SimpleNamespace(do_train=True, **values)
    with pytest.raises(InputError, match=r"^row 2: sample row-17") as caught:
        build_dataset(rows, lambda row: row, processor(), args, "train")
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_sample_that_is_too_long_is_refused_with_both_lengths():
    conversation = CONVERSATIONS["two images"]
    length = len(encode_conversation(conversation, processor())["input_ids"])
    assert encode_conversation(conversation, processor(), max_length=length)
    with pytest.raises(InputError, match=rf"at most {length - 1} tokens, found {length};.*--num_crops.*--max_length"):
        encode_conversation(conversation, processor(), max_length=length - 1)


def test_other_angle_brackets_are_plain_text():
    conversation = Conversation("x", one("a <b> <|> <|no_token|> c", ["<p>"]))
    check_conversation(conversation, control_tokens(processor().tokenizer))


@pytest.mark.parametrize("token", ["<s>", "</s>", "<unk>"])
def test_a_control_token_of_the_other_kind_does_not_become_one(token):
    # "<s>" in a text (struck through, in HTML) must be refused or stay text; it must not begin a document.
    conversation = Conversation("x", one(f"What is {token} in HTML?", ["a tag"]))
    try:
        encoded = encode_conversation(conversation, processor())
    except InputError:
        return
    plain = encode_conversation(Conversation("x", one("What is it in HTML?", ["a tag"])), processor())
    tokenizer = processor().tokenizer
    identity = tokenizer.convert_tokens_to_ids(token)
    assert encoded["input_ids"].count(identity) == plain["input_ids"].count(identity)


# ---- EXIF


def camera_picture(path: Path, orientation: int) -> Path:
    """A picture whose upper left pixels are red, stored as a camera would store it that is held otherwise."""
    image = Image.new("RGB", (90, 40), "white")
    image.paste("red", (0, 0, 30, 20))
    back = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = image if back is None else image.transpose(back)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_picture_is_turned_as_its_camera_was_held(orientation, suffix, tmp_path):
    path = camera_picture(tmp_path / f"photo{suffix}", orientation)
    conversation = Conversation("x", [Turn("What?", ["yes"], [str(path)])])
    (image,) = load_images(conversation)
    assert image.size == (90, 40)
    red, white = image.convert("RGB").getpixel((10, 8)), image.convert("RGB").getpixel((70, 30))
    assert red[0] > 200
    assert red[1] < 60
    assert min(white) > 200


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("portrait", [False, True])
def test_tokens_counted_from_the_header_are_those_of_the_encoded_image(orientation, portrait, tmp_path):
    # A wide upright picture gives other numbers of crops and tokens than the one on its side.
    image = tiny.picture(30, 90) if portrait else tiny.picture(90, 30)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / "photo.jpg", exif=exif)
    conversation = Conversation("x", [Turn("What?", ["yes", "a longer one"], [str(tmp_path / "photo.jpg")])])
    counted = count_tokens(conversation, processor())
    lengths = {len(encode_conversation(conversation, processor(), epoch=epoch)["input_ids"]) for epoch in range(10)}
    assert counted == max(lengths)


def test_an_exif_turned_pil_image_is_counted_alike(tmp_path):
    image = Image.open(camera_picture(tmp_path / "photo.jpg", 6))
    conversation = Conversation("x", [Turn("What?", ["yes"], [image])])
    assert count_tokens(conversation, processor()) == len(encode_conversation(conversation, processor())["input_ids"])


@pytest.mark.parametrize(
    "value", [b"\0\3\0\0\0\1\0\0\0\0", b"\0\3\0\0\0\1\0\x63\0\0", b"\0\2\0\0\0\2a\0\0\0"], ids=["0", "99", "a text"]
)
def test_a_nonsensical_orientation_is_no_orientation(value, tmp_path):
    # The EXIF block of a single tag, 0x112: its type, count and value.
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12" + value + b"\0\0\0\0"
    tiny.picture(90, 30).save(tmp_path / "photo.jpg", exif=exif)
    conversation = Conversation("x", one(images=[tmp_path / "photo.jpg"]))
    assert load_images(conversation)[0].size == (90, 30)
    assert count_tokens(conversation, processor()) == len(encode_conversation(conversation, processor())["input_ids"])


def test_the_longest_answer_is_counted_in_tokens_not_characters():
    # Three characters that the tokenizer spells byte by byte, against five that are a token each.
    conversation = Conversation("x", one(answers=["日本語", "abcde"]))
    lengths = {len(encode_conversation(conversation, processor(), epoch=epoch)["input_ids"]) for epoch in range(10)}
    assert len(lengths) == 2
    assert count_tokens(conversation, processor()) == max(lengths)


def test_counting_reads_no_pixels(tmp_path):
    conversation = Conversation("x", [Turn("What?", ["yes"], [truncated(tmp_path)])])
    assert count_tokens(conversation, processor()) > 20


def test_open_image_leaves_the_pixels_for_later(tmp_path):
    tiny.picture(20, 10).save(tmp_path / "page.png")
    image = open_image(tmp_path / "page.png")
    assert image.size == (20, 10)
    assert open_image(image) is image
    with pytest.raises(InputError, match="image bytes"):
        open_image({"bytes": b"no", "path": None})


# ---- the limit of pixels


class Opened(torch.utils.data.Dataset):
    """Says what opening an image comes to."""

    def __init__(self, path: Path):
        self.path = path

    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            return open_image(self.path).size
        except InputError as error:
            return str(error)


@pytest.mark.parametrize("start", [None, "fork", "spawn"])
def test_the_limit_of_pixels_holds_in_forked_and_in_spawned_workers(start, tmp_path):
    tiny.picture(30, 20).save(tmp_path / "page.png")
    for limit in (600, 599):
        limit_pixels(limit)
        loader = DataLoader(
            Opened(tmp_path / "page.png"),
            batch_size=None,
            num_workers=int(start is not None),
            multiprocessing_context=start,
        )
        (found,) = loader
        if limit == 600:
            assert list(found) == [30, 20]
        else:
            assert found.endswith("page.png: expected at most 599 pixels (--max_image_pixels), found 30 x 20")


def test_the_limit_of_pixels_is_the_only_one(tmp_path):
    # Pillow's own errors begin at 179 million pixels.
    (tmp_path / "large.png").write_bytes(png_header(20_000, 10_000))
    with pytest.raises(InputError, match="at most 180000000 pixels"):
        open_image(tmp_path / "large.png")
    limit_pixels(200_000_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "large.png").size == (20_000, 10_000)
    with pytest.raises(InputError, match=r"large.png: expected a whole image, found: "):
        load_image(tmp_path / "large.png")
    limit_pixels(100)
    with pytest.raises(InputError, match="image: expected at most 100 pixels"):
        open_image(tiny.picture(11, 10))


def test_only_the_named_formats_are_opened(tmp_path):
    for suffix in ("jpg", "png", "webp", "bmp", "gif", "tiff", "ppm"):
        tiny.picture(30, 20).save(tmp_path / f"a.{suffix}")
        assert load_image(tmp_path / f"a.{suffix}").size == (30, 20)
    tiny.picture(30, 20).save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[tiny.picture(30, 20, 1)])
    assert load_image(tmp_path / "phone.jpg").size == (30, 20)
    for suffix in ("ico", "tga", "pcx", "eps", "jp2", "dds"):
        tiny.picture(32, 32).save(tmp_path / f"a.{suffix}")
        with pytest.raises(
            InputError, match="expected a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM image, found another format"
        ):
            open_image(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_a_damaged_image_is_read_or_refused_in_one_line(suffix, tmp_path):
    path, chance = tmp_path / f"a.{suffix}", random.Random(suffix)
    tiny.picture(60, 40).save(path)
    content = path.read_bytes()
    for number in range(60):
        damaged = bytearray(content[: chance.randrange(1, len(content))] if number % 3 == 0 else content)
        for _ in range(number % 20):
            damaged[chance.randrange(min(len(damaged), 300))] = chance.randrange(256)
        path.write_bytes(damaged)
        for function in (image_size, load_image):
            try:
                function(path)
            except InputError as error:
                line = str(error)
                assert line.startswith(f"{path}: expected")  # noqa: PT017
                assert line.isprintable()  # noqa: PT017
