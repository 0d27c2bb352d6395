"""TRL's SFTTrainer with the native model: `make test-trl`, in an environment of its own."""

import logging
import re
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is installed by make test-trl, in an environment of its own")

import recipe
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from PIL import Image
from trl import SFTConfig, SFTTrainer

from demo import build_model
from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.encoding import encode_conversation
from finetuning.training.parts import LORA_TARGETS
from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.modeling_phi3_v import IGNORE_INDEX

own_process = pytest.fixture(autouse=True)(recipe.own_process)

DOCUMENT = (Path(__file__).parents[2] / "docs" / "trl.md").read_text(encoding="utf-8")
LANGUAGE_TARGETS, VISION_TARGETS = LORA_TARGETS["language"], LORA_TARGETS["vision"] + LORA_TARGETS["projector"]
WITHOUT_HEAD = [name for name in LANGUAGE_TARGETS if name != "lm_head"]
# An image each, two at once, one in a later turn, none. A blank before an answer, and several lines.
CONVERSATIONS = [
    Conversation("one", [Turn("Which digits?", ["407"], [tiny.picture(200, 150, 1)])]),
    Conversation("two", [Turn("Same?", [" No,\nnot at all."], [tiny.picture(60, 200, 2), tiny.picture(50, 50, 3)])]),
    Conversation("later", [Turn("Hello.", ["Hi."]), Turn("And this?", ["A cat."], [tiny.picture(90, 40, 4)])]),
    Conversation("text", [Turn("Who?", ["Nobody, 日."]), Turn("Sure?", ["Yes."])]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def processor(folder) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(folder, num_crops=3)


def dataset(conversations, form: str = "parts") -> Dataset:
    """Rows as TRL takes them: `images`, and `messages` of content parts or of strings, or `prompt` and `completion`."""
    rows = []
    for conversation in conversations:
        messages = []
        for turn in conversation.turns:
            parts = [{"type": "image"} for _ in turn.images] + [{"type": "text", "text": turn.user}]
            answer = [{"type": "text", "text": turn.answers[0]}]
            if form == "strings":
                parts, answer = turn.user, turn.answers[0]
            messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        columns = {"messages": messages}
        if form == "prompt and completion":
            columns = {"prompt": messages[:-1], "completion": messages[-1:]}
        rows.append({"images": conversation.images, **columns})
    return Dataset.from_list(rows)


def trainer(folder, processor, rows: Dataset, target_modules=WITHOUT_HEAD, exclude=None, **settings) -> SFTTrainer:
    given = {"max_length": None, "assistant_only_loss": True, "per_device_train_batch_size": 4, "logging_steps": 1}
    return SFTTrainer(
        Phi3VForCausalLM.from_pretrained(folder),
        args=SFTConfig("output", use_cpu=True, bf16=False, disable_tqdm=True, **{**given, **settings}),
        train_dataset=rows,
        processing_class=processor,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=target_modules, exclude_modules=exclude),
    )


def losses(found: SFTTrainer) -> list[float]:
    return [float(entry["loss"]) for entry in found.state.log_history if "loss" in entry]


@torch.no_grad()
def logits(model, inputs) -> torch.Tensor:
    return model.eval()(**inputs).logits


@pytest.mark.parametrize("vision", [False, True], ids=["language", "language and vision"])
def test_it_learns_and_the_adapter_loads_with_the_same_logits(folder, processor, vision, caplog):
    targets = WITHOUT_HEAD + (VISION_TARGETS if vision else [])
    exclude = r".*\.vision_model\.encoder\.layers\.2\..*"  # the demo's tower has 3
    logging.getLogger("trl").addHandler(caplog.handler)
    found = trainer(folder, processor, dataset(CONVERSATIONS), targets, exclude, max_steps=20, learning_rate=1e-2)
    logging.getLogger("trl").removeHandler(caplog.handler)
    assert "may not learn to stop" not in caplog.text
    adapters = {name: parameter for name, parameter in found.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in adapters)
    assert any("vision_embed_tokens" in name for name in adapters) == vision
    before = {name: parameter.detach().clone() for name, parameter in adapters.items()}
    found.train()
    assert len(losses(found)) == 20
    assert losses(found)[-1] < 0.6 * losses(found)[0]
    assert not [name for name in adapters if torch.equal(adapters[name], before[name])], "every one of them learns"

    found.save_model()
    inputs = processor("<|user|>\n<|image_1|>\nWhich digits?<|end|>\n<|assistant|>\n", CONVERSATIONS[0].images)
    base = Phi3VForCausalLM.from_pretrained(folder)
    without = logits(base, inputs)
    loaded = PeftModel.from_pretrained(base, "output")
    expected = logits(found.model, inputs)
    assert (expected - without).abs().max() > 0.1
    assert torch.equal(logits(loaded, inputs), expected)
    # and the folder's processor is the one that was given
    saved = Phi3VProcessor.from_pretrained("output")
    assert saved.image_processor.to_dict() == processor.image_processor.to_dict()
    assert saved.chat_template == processor.chat_template


def collated(folder, processor, conversations, form: str = "parts", **settings):
    """What TRL's collator makes of the conversations, and our own; ours without the final `<|endoftext|>` of each row."""
    rows = dataset(conversations, form)
    theirs = trainer(folder, processor, rows, **settings).data_collator([rows[index] for index in range(len(rows))])
    features = [encode_conversation(conversation, processor) for conversation in conversations]
    for feature in features:
        assert feature["input_ids"][-1] == feature["labels"][-1] == processor.tokenizer.eos_token_id
        feature["input_ids"], feature["labels"] = feature["input_ids"][:-1], feature["labels"][:-1]
    return theirs, DataCollatorForPhi3V(processor.tokenizer.pad_token_id)(features)


ROWS = pytest.mark.parametrize(
    "conversations",
    [CONVERSATIONS, *([conversation] for conversation in CONVERSATIONS)],
    ids=["all", *(conversation.id for conversation in CONVERSATIONS)],
)


@ROWS
def test_it_is_fed_what_the_scripts_feed_but_for_the_final_endoftext(folder, processor, conversations):
    theirs, ours = collated(folder, processor, conversations)
    assert theirs.keys() == ours.keys() - {"ids", "sources"}
    for name in theirs:
        assert torch.equal(theirs[name], ours[name]), name


def test_images_of_string_messages_stand_before_the_first_question(folder, processor):
    first = [conversation for conversation in CONVERSATIONS if conversation.id != "later"]
    theirs, ours = collated(folder, processor, first, "strings")
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@ROWS
def test_without_assistant_only_loss_every_token_is_trained_image_tokens_too(folder, processor, conversations):
    theirs, ours = collated(folder, processor, conversations, assistant_only_loss=False)
    assert torch.equal(theirs["input_ids"], ours["input_ids"])
    assert torch.equal(theirs["labels"], ours["input_ids"].masked_fill(ours["attention_mask"] == 0, IGNORE_INDEX))


def test_texts_alone_need_no_images(folder, processor):
    text = [conversation for conversation in CONVERSATIONS if not conversation.images]
    rows = dataset(text, "strings").remove_columns("images")
    found = trainer(folder, processor, rows, max_steps=2, learning_rate=1e-2)
    feature = encode_conversation(text[0], processor)
    assert found.train_dataset[0]["input_ids"] == feature["input_ids"][:-1]
    assert found.train_dataset[0]["labels"] == feature["labels"][:-1]
    found.train()
    assert losses(found)[1] < losses(found)[0]


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=lambda conversation: conversation.id)
def test_a_completion_begins_with_a_bos_that_no_answer_has(folder, processor, conversation):
    theirs, ours = collated(folder, processor, [conversation], "prompt and completion", assistant_only_loss=False)
    ids, labels = theirs["input_ids"][0], theirs["labels"][0]
    start = int((labels != IGNORE_INDEX).nonzero()[0])
    assert ids[start] == labels[start] == processor.tokenizer.bos_token_id
    assert processor.tokenizer.decode(ids[:start]).rstrip().endswith("<|assistant|>")
    assert int((ours["input_ids"] == ids[start]).sum()) == int((ids == ids[start]).sum()) - 1
    assert all(torch.equal(theirs[name], ours[name]) for name in ("pixel_values", "image_sizes") if name in ours)


def test_the_loss_is_the_models_own(folder, processor):
    rows = dataset(CONVERSATIONS)
    found = trainer(folder, processor, rows)
    batch = found.data_collator([rows[index] for index in range(len(rows))])
    with torch.no_grad():
        torch.testing.assert_close(found.compute_loss(found.model, dict(batch)), found.model(**batch).loss)


def test_an_adapter_on_the_head_is_refused(folder, processor):
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trainer(folder, processor, dataset(CONVERSATIONS), LANGUAGE_TARGETS)


def test_a_row_longer_than_max_length_is_refused_in_one_line(folder, processor):
    rows = dataset(CONVERSATIONS)
    with pytest.raises(
        ValueError, match="a text of .* tokens: expected at most max_length 40, since nothing is cut"
    ) as error:
        trainer(folder, processor, rows, max_length=40).data_collator([rows[0]])
    assert "\n" not in str(error.value)


def test_the_example_of_the_document_runs_as_written(folder, tmp_path, monkeypatch):
    # TRL's own defaults need a GPU with bf16.
    monkeypatch.setattr("trl.SFTConfig", partial(SFTConfig, use_cpu=True, bf16=False, logging_steps=1))
    train, load = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    Image.new("RGB", (200, 260), "white").save(tmp_path / "page.png")
    variables: dict = {}
    exec(train.replace("microsoft/Phi-3.5-vision-instruct", str(folder)), variables)
    trained, found = variables["model"], variables["trainer"]
    assert variables["processor"].image_processor.num_crops == 16
    assert losses(found)[-1] < losses(found)[0]
    exec(load, variables)
    assert variables["model"] is not trained
    batch = found.data_collator([variables["rows"][0]])
    del batch["labels"]  # with them the model returns no logits
    assert torch.equal(logits(variables["model"], batch), logits(found.model, batch))
    names = re.search(r"target_modules=(\[.*?\])", train)[1]
    assert names == str(WITHOUT_HEAD).replace("'", '"')
    assert all(f"`{name}`" in DOCUMENT for name in VISION_TARGETS)
