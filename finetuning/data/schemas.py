"""Rows as pydantic models: what a row of a task or of a known format holds, checked before any of it reaches a prompt.

A script declares its rows above `to_conversation` and parses them there:

    class Question(RowModel):
        id: RowId
        image: Picture
        question: Text
        answer: Text

    def to_conversation(row: dict) -> Conversation:
        row = parse_row(row, Question, ConvertedRow)
"""

from collections.abc import KeysView, Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..errors import InputError
from .clips import Clip, Frame, check_clip
from .conversation import Conversation, Turn, check_picture, check_text
from .shown import printable, shown


def _check_id(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected text or a whole number, found {shown(value)}")
    return value


def _check_answers(value: Any) -> list:
    if isinstance(value, str):
        return [check_text(value)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected text or a list with at least one text, found {shown(value)}")
    return value


# Text that is not blank: never null, NaN, a number, a list or an object.
Text = Annotated[str, BeforeValidator(check_text)]
# Text that is not blank; a whole number becomes text.
RowId = Annotated[str, BeforeValidator(_check_id)]
# What `images.open_image` takes: a path, a PIL image, or the {"bytes", "path"} of a `datasets.Image` column. Never null.
Picture = Annotated[Any, BeforeValidator(check_picture)]
# What `clips.Clip` is; readers that take clips make it of a path.
Video = Annotated[Clip, BeforeValidator(check_clip)]
# One acceptable answer or a list of them.
Answers = Annotated[list[Text], BeforeValidator(_check_answers)]


def _listed(value: Any) -> Any:
    return [] if value in (None, "") else value if isinstance(value, list) else [value]


# Pictures or clips of a row: none, one, or a list.
Pictures = Annotated[list[Picture], BeforeValidator(_listed)]
Videos = Annotated[list[Video], BeforeValidator(_listed)]


def frames_of(clips: list[Clip]) -> list[Frame]:
    """The frames of some clips, one after another."""
    return [frame for clip in clips for frame in clip.frames]


class RowModel(BaseModel):
    """A row, or an object inside one: types are never converted, fields that are not declared are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", arbitrary_types_allowed=True)


Model = TypeVar("Model", bound=RowModel)


class ConvertedTurn(RowModel):
    """A turn of a converted row; `images` are paths relative to the folder images/ beside the jsonl file; clips come after them."""

    images: list[Picture] = []
    videos: Videos = Field(default=[], validation_alias=AliasChoices("videos", "video"))
    user: Text
    assistant: Answers


class ConvertedRow(RowModel):
    """A row of a converted folder, the form that every script takes and `validate --convert` writes (README)."""

    id: RowId
    conversations: list[ConvertedTurn] = Field(min_length=1)

    def to_conversation(self) -> Conversation:
        """The same as a Conversation."""
        return Conversation(
            self.id,
            [Turn(turn.user, turn.assistant, turn.images + frames_of(turn.videos)) for turn in self.conversations],
        )


# The last line of a question of the_cauldron that asks for a short answer. Source: QUESTION_BRIEVETY_HINT and
# PROMPTS_ANSWER_SHORTLY of the script that built it.
BREVITY_HINTS = (
    "Answer briefly.", "Be succinct.", "Concise answer only.", "Ensure brevity in your answer.", "Give a very brief answer.",
    "Keep it brief.", "Keep it short and to the point.", "Make the answer very short.", "Offer a terse response.",
    "Offer a very short reply.", "Provide a short and direct response.", "Provide a succinct answer.",
    "Quick response, please.", "Short answer required.", "Write a very short answer.", "Your answer should be compact.",
    "Your answer should be very brief.", "Your response must be concise.",
)  # fmt: skip


class CauldronText(RowModel):
    """A question and its answer in a row of the_cauldron."""

    user: Text
    assistant: Text

    @property
    def question(self) -> str:
        """The question without the line that asks for a short answer; all of its other lines stay."""
        question, _, last = self.user.rstrip().rpartition("\n")
        return question.rstrip() if question.strip() and last.strip() in BREVITY_HINTS else self.user


class CauldronRow(RowModel):
    """A row of HuggingFaceM4/the_cauldron, of any of its parts; `load_hub` gives it an id."""

    id: RowId
    images: list[Picture] = Field(min_length=1)
    texts: list[CauldronText] = Field(min_length=1)


class ChatPart(RowModel):
    """A part of a message: {"type": "text", "text"}, {"type": "image_url", "image_url": {"url"}}, {"type": "image", "image"},
    {"type": "video", "video"}.
    """

    type: Literal["text", "image_url", "image", "video"]
    # Null where a file of columns holds parts of several types.
    text: str | None = None
    image_url: Picture | None = None
    image: Picture | None = None
    video: Video | None = None


class ChatMessage(RowModel):
    """A message: {"from", "value"} in LLaVA and ShareGPT, {"role", "content"} in OpenAI's form."""

    role: Literal["system", "human", "user", "gpt", "assistant"] = Field(validation_alias=AliasChoices("from", "role"))
    content: str | list[ChatPart] = Field(validation_alias=AliasChoices("value", "content"))


class ChatRow(RowModel):
    """A row of LLaVA or ShareGPT (`conversations`) or of OpenAI's form (`messages`); `<image>` stands for the next image, `<video>` for the next clip."""

    id: RowId
    system: str | None = None
    images: Pictures = Field(default=[], validation_alias=AliasChoices("images", "image"))
    videos: Videos = Field(default=[], validation_alias=AliasChoices("videos", "video"))
    messages: list[ChatMessage] = Field(min_length=1, validation_alias=AliasChoices("messages", "conversations"))


class QuestionRow(RowModel):
    """A question and its answer, or acceptable answers, in columns; without a picture or clip, with one or with several."""

    id: RowId
    images: Pictures = Field(default=[], validation_alias=AliasChoices("images", "image"))
    videos: Videos = Field(default=[], validation_alias=AliasChoices("videos", "video"))
    question: Text
    answers: Answers = Field(validation_alias=AliasChoices("answer", "answers"))


def chat_format(row: Any) -> str | None:
    """Name of the known chat format that a row seems to be of; None for any other, the converted form included."""
    if not isinstance(row, Mapping):
        return None
    if "messages" in row:
        return "OpenAI messages"
    turns = row.get("conversations")
    turn = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(turn, dict) and "user" not in turn and not {"from", "value", "role", "content"}.isdisjoint(turn):
        return "LLaVA / ShareGPT"
    return None


def conversion_advice(name: str) -> str:
    """What to do with data of a form that a task's own script does not read, as the end of a message."""
    return (
        f"found {name}, which finetune_hf_trainer_own_data.py reads as it is, and this command converts: "
        "python -m finetuning.validate DIR --convert OUT"
    )


def parse_row(row: Mapping[str, Any], *models: type[Model]) -> Model:
    """A row as an instance of the first of the models whose required fields it has.

    Args:
        row (Mapping): a row of a data set.
        models (type[RowModel]): forms that it may have, such as the script's own and `ConvertedRow`.

    Raises:
        InputError: in one line, with the id and the field (`sample 7: query.en: expected text, found null`); for a row of a
            chat format with the command that converts it.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"expected a row with named fields, found {shown(row)}")
    model = _closest_model(row, models)
    if model is None:
        forms = "; or ".join(", ".join(_required_fields(model)) for model in models)
        message = f"expected the fields {forms}, found {_field_names(row)}"
    else:
        try:
            return model.model_validate(row if isinstance(row, dict) else dict(row))
        except ValidationError as error:
            message = describe_fault(error, row)
    if name := chat_format(row):
        message = f'expected "conversations" of {{"user", "assistant"}}, {conversion_advice(name)}'
    raise InputError(f"{sample_name(row)}{message}")


def row_id(row: Any) -> str | None:
    """The id of a row, or None where it has no usable one."""
    try:
        return _check_id(row["id"])
    except (KeyError, TypeError, ValueError):
        return None


def sample_name(row: Any) -> str:
    """How a message on a row begins: `sample ID: `, or nothing where the row has no usable id."""
    name = row_id(row)
    return "" if name is None else f"sample {printable(name)}: "


def describe_fault(error: ValidationError, row: Any) -> str:
    """The first fault that pydantic found in a row, as `field: expected ..., found ...`."""
    faults = [(_field_path(fault["loc"], row), fault) for fault in error.errors(include_url=False)]
    # Where a field may be text or a list, pydantic lists a fault for each: the one inside the value says more.
    path, fault = max(faults, key=lambda item: len(item[0]))
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    return f"{printable(name)}: {_expectation(fault, path, row)}"


def _expectation(fault: Any, path: list[str | int], row: Any) -> str:
    kind, context, found = fault["type"], fault.get("ctx", {}), shown(fault["input"])
    if kind == "missing":
        for part in path[:-1]:
            row = row[part]
        return f"expected this field, found {_field_names(row)}"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("too_short", "too_long"):
        few = kind == "too_short"
        count = f"at least {context['min_length']}" if few else f"at most {context['max_length']}"
        return f"expected a list with {count} item(s), found {context['actual_length']}"
    if kind in ("greater_than_equal", "less_than_equal"):
        bound = f"at least {context['ge']}" if kind == "greater_than_equal" else f"at most {context['le']}"
        return f"expected {bound}, found {found}"
    expected = {
        "literal_error": context.get("expected"),
        "string_type": "text",
        "list_type": "a list",
        "dict_type": "an object",
        "model_type": "an object",
        "int_type": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
    }.get(kind)
    return f"expected {expected}, found {found}" if expected else f"{printable(fault['msg'])}, found {found}"


def _field_path(location: tuple[str | int, ...], row: Any) -> list[str | int]:
    """Keys that lead from the row to the value at fault; pydantic's names of union members are left out."""
    path: list[str | int] = []
    for index, part in enumerate(location):
        try:
            row = row[part]
        except (KeyError, TypeError, IndexError):
            # A field that is missing ends the path; anything else here is the name of a union's member.
            if index < len(location) - 1 or not isinstance(row, Mapping):
                continue
        path.append(part)
    return path


@cache
def _required_fields(model: type[RowModel]) -> KeysView[str]:
    """Names of the fields that a row needs, in the model's order; rows without an id are told apart by the others."""
    return {name: None for name, field in model.model_fields.items() if field.is_required() and name != "id"}.keys()


def _closest_model(row: Mapping[str, Any], models: tuple[type[Model], ...]) -> type[Model] | None:
    """The first model whose required fields are all there, or else the one of which most are; None without any."""
    for model in models:
        if row.keys() >= _required_fields(model):
            return model
    present = [sum(name in row for name in _required_fields(model)) for model in models]
    return models[present.index(max(present))] if any(present) else None


def _field_names(row: Mapping) -> str:
    return printable(", ".join(map(str, row)), 120) or "no field"
