"""Fine-tunes Phi-3.5-vision with preferences, a chosen and a rejected answer to each question, by TRL's DPOTrainer (LoRA).

    pip install -r requirements-trl.txt
    torchrun --nproc_per_node=8 finetune_trl_dpo.py --learning_rate 5e-6

Data: openbmb/RLAIF-V-Dataset, its first 500 rows held back; or --data_dir with rows {"id", "images", "prompt", "chosen",
"rejected"}, or RLAIF-V's {"image", "question", "chosen", "rejected"}, in train.jsonl and test.jsonl, or in .parquet files of
these names (image paths are relative to that folder; docs/trl.md).

Metric: rewards/margins over the rows held back, before and after: how much more the trained model prefers the chosen
answer to the rejected one than the model it began with, in nats times --beta.

Written into --output_dir: the adapter and the processor, eval_before.json, eval_after.json, trainer_state.json (all
figures of training), checkpoint-N/. `--help` lists all flags: TRL's own, and the recipe's for model, data and LoRA.
"""

from typing import Annotated

from pydantic import AliasChoices, BeforeValidator, Field

from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import build_dataset
from finetuning.data.hub import load_hub
from finetuning.data.preferences import PreferenceCollator, check_preference, one_message, preference_dataset
from finetuning.data.reading import load_folder
from finetuning.data.schemas import Picture, RowId, RowModel, Text, parse_row
from finetuning.errors import run_script
from finetuning.results.trl_results import train_and_evaluate
from finetuning.training.loading import load_processor
from finetuning.training.trl_model import load_trl_model, trl_lora_config
from finetuning.trl_arguments import TrlArguments, import_trl, parse_trl_args

HELD_OUT = 500
# A text, or TRL's list of one message.
Said = Annotated[Text, BeforeValidator(one_message)]


def load_splits(args: TrlArguments):
    """Rows to train on and rows that are held back."""
    if args.data_dir:
        return load_folder(args, evaluation=("test", "val"))
    rows = load_hub(args, "openbmb/RLAIF-V-Dataset")
    return rows.select(range(HELD_OUT, len(rows))), rows.select(range(HELD_OUT))


class PreferenceRow(RowModel):
    """A question about any number of pictures, and the two answers; the form of TRL's data sets."""

    id: RowId
    images: list[Picture] = []
    prompt: Said
    chosen: Said
    rejected: Said


class RLAIFRow(RowModel):
    """A row of openbmb/RLAIF-V-Dataset."""

    id: RowId = Field(validation_alias=AliasChoices("id", "idx"))
    image: Picture
    question: Text
    chosen: Text
    rejected: Text


def to_conversation(row: dict) -> Conversation:
    """One turn with two answers: the chosen one, then the rejected one."""
    parsed = parse_row(row, PreferenceRow, RLAIFRow)
    answers = [parsed.chosen, parsed.rejected]
    if isinstance(parsed, PreferenceRow):
        turn = Turn(parsed.prompt, answers, parsed.images)
    else:
        turn = Turn(parsed.question, answers, [parsed.image])
    return check_preference(Conversation(parsed.id, [turn]))


def main():
    args, settings = parse_trl_args("DPOConfig", TrlArguments)
    processor = load_processor(args)
    train_rows, eval_rows = load_splits(args)
    train_dataset = build_dataset(train_rows, to_conversation, processor, args, split="train")
    eval_dataset = build_dataset(eval_rows, to_conversation, processor, args, split="eval")

    model = load_trl_model(args, settings)
    trainer = import_trl().DPOTrainer(
        model=model,
        args=settings,
        train_dataset=preference_dataset(train_dataset),
        eval_dataset=preference_dataset(eval_dataset),
        data_collator=PreferenceCollator(processor.tokenizer.pad_token_id),
        processing_class=processor,
        peft_config=trl_lora_config(model.config, args),
    )
    train_and_evaluate(trainer)


if __name__ == "__main__":
    run_script(main)
