"""Fine-tunes Phi-3.5-vision to judge statements about two pictures (NLVR2): several images, several turns.

    torchrun --nproc_per_node=8 finetune_hf_trainer_nlvr2.py --bf16 --use_flash_attention --batch_size 64 \\
        --learning_rate 1e-5 --num_train_epochs 3

Data: the_cauldron's nlvr2, its first 500 rows to answer and the others to train; or --data_dir with rows {"id", "images",
"texts": [{"user", "assistant"}, ...]} in rows*.jsonl, which then have a field "split" of train or test, or in train.jsonl
and test.jsonl (image paths are relative to that folder), or with a converted folder (README).

Metrics: accuracy over all questions, 0 to 1, and accuracy_first_question over the first question of each row alone, which
is what the published 89.40 counts.

Written into --output_dir: weights or adapter and the processor, eval_before.json, eval_after.json, predictions.jsonl,
curves.png, confusion.png, report.html, checkpoint-N/. `--help` lists all flags.
"""

from pydantic import Field

from finetuning.arguments import RecipeArguments, parse_args
from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import build_dataset
from finetuning.data.hub import load_hub
from finetuning.data.reading import load_folder
from finetuning.data.schemas import CauldronText, ConvertedRow, Picture, RowId, RowModel, parse_row
from finetuning.errors import run_script
from finetuning.results.evaluation import evaluate, score_again
from finetuning.results.metrics import exact_match
from finetuning.results.predictions import Prediction
from finetuning.results.report import report_at_end, write_report
from finetuning.training.loading import load_model, load_processor
from finetuning.training.resume import begin_or_resume
from finetuning.training.summary import print_summary
from finetuning.training.trainer import RecipeTrainer

HELD_OUT = 500


def load_splits(args: RecipeArguments):
    """Rows to train on and rows to answer."""
    if args.data_dir:
        return load_folder(args, evaluation=("test", "val", "dev"))
    rows = load_hub(args, "HuggingFaceM4/the_cauldron", "nlvr2")
    return rows.select(range(HELD_OUT, len(rows))), rows.select(range(HELD_OUT))


class PairRow(RowModel):
    """Two pictures and statements about them, each {"user", "assistant"}: the form of the_cauldron."""

    id: RowId
    images: list[Picture] = Field(min_length=2, max_length=2)
    texts: list[CauldronText] = Field(min_length=1)


def to_conversation(row: dict) -> Conversation:
    """Two pictures, shown in the first turn, and one statement a turn; every turn is trained and answered."""
    parsed = parse_row(row, ConvertedRow, PairRow)
    if isinstance(parsed, ConvertedRow):
        return parsed.to_conversation()
    turns = [Turn(text.user, [text.assistant]) for text in parsed.texts]
    turns[0].images = parsed.images
    return Conversation(parsed.id, turns)


def score(predictions: list[Prediction]) -> dict[str, float]:
    """Accuracy over all questions, and over the first one of each row."""
    right = [exact_match(item.answer, item.references) for item in predictions]
    first = [is_right for item, is_right in zip(predictions, right, strict=True) if item.turn == 0]
    return {"accuracy": sum(right) / len(right), "accuracy_first_question": sum(first) / len(first)}


def main():
    args = parse_args()
    processor = load_processor(args)
    train_rows, eval_rows = load_splits(args)
    train_dataset = build_dataset(train_rows, to_conversation, processor, args, split="train")
    eval_dataset = build_dataset(eval_rows, to_conversation, processor, args, split="eval")
    if begin_or_resume(args, train_dataset, eval_dataset) and score_again(eval_dataset, score, args):
        write_report(args, __doc__, eval_dataset, score)
        return

    model = load_model(args)
    print_summary(model, args, train_dataset)
    trainer = RecipeTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=DataCollatorForPhi3V(processor.tokenizer.pad_token_id, args.padding_free),
        processing_class=processor,
    )
    with report_at_end(trainer, __doc__, eval_dataset, score):
        evaluate(model, eval_dataset, score, args, stage="before")
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        evaluate(model, eval_dataset, score, args, stage="after")


if __name__ == "__main__":
    run_script(main)
