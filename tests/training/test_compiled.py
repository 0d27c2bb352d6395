"""Compiled layers: what answers stays eager, what trains is compiled, and no step compiles it anew."""

from pathlib import Path

import pytest
import recipe
import torch
from torch._dynamo.utils import counters

from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import build_dataset
from finetuning.results.answering import generate_answers
from finetuning.training.identity import write_run
from finetuning.training.loading import load_model, load_processor
from finetuning.training.trainer import RecipeTrainer


@pytest.fixture(autouse=True)
def own_process(tmp_path, monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    yield from recipe.own_process(tmp_path, monkeypatch)
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class Graphs(RecipeTrainer):
    """Notes the number of graphs after each micro-batch."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.graphs = [*getattr(self, "graphs", []), graphs()]
        return loss


@pytest.mark.parametrize("flags", [[], ["--use_lora", "--lora_rank", "2"]], ids=["full", "lora"])
def test_training_is_compiled_once_and_answers_are_not(tmp_path: Path, flags):
    folder = recipe.model_folder(tmp_path / "model")
    data = recipe.docvqa_rows(tmp_path / "data", 1, 1)
    args = recipe.arguments(
        folder,
        *("--torch_compile_backend", "eager", "--max_steps", "5", "--batch_size", "1", "--deepspeed", "none", *flags),
        *("--max_new_tokens", "9", "--dataloader_num_workers", "0", "--save_strategy", "no", "--warmup_steps", "0"),
    )
    processor = load_processor(args)
    rows = [
        {"id": str(number), "image": str(data / "images" / f"{number % 2}.png"), "text": "a long question " * number}
        for number in range(1, 6)
    ]

    def to_conversation(row):
        return Conversation(row["id"], [Turn(row["text"], ["yes"], [row["image"]])])

    dataset = build_dataset(rows, to_conversation, processor, args, split="train")
    write_run(Path(args.output_dir), {})
    model = load_model(args)
    trainer = Graphs(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=DataCollatorForPhi3V(processor.tokenizer.pad_token_id, args.padding_free),
        processing_class=processor,
    )
    generate_answers(model, dataset, args, "before")
    assert graphs() == 0
    trainer.train()
    first, *others = trainer.graphs
    # A layer of CLIP and one of the language model; pictures and texts of other sizes in each step.
    assert first >= 2
    assert set(others) == {first}
    generate_answers(model, dataset, args, "after")
    assert graphs() == first
