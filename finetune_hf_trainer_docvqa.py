"""Fine-tunes Phi-3.5-vision to answer questions about scanned documents (DocVQA).

    torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py --bf16
    torchrun --nproc_per_node=8 finetune_hf_trainer_docvqa.py --full_train --bf16 --batch_size 64 --learning_rate 5e-6

Data: nielsr/docvqa_1200_examples (1,000 questions to train, 200 to test); with --full_train the_cauldron's docvqa to train
and the same 200 to test; or --data_dir with rows {"id", "image", "query": {"en"}, "answers"} in rows.jsonl, which then has a
field "split" of train or test, or in train.jsonl and test.jsonl (image paths are relative to that folder), or with a
converted folder (README).

Metric: ANLS, average normalised Levenshtein similarity, 0 to 1, best over the acceptable answers.

Written into --output_dir: weights or adapter and the processor, eval_before.json, eval_after.json, predictions.jsonl,
curves.png, report.html, checkpoint-N/. `--help` lists all flags.
"""

from pydantic import Field

from finetuning.arguments import RecipeArguments, parse_args
from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import build_dataset
from finetuning.data.hub import load_hub
from finetuning.data.reading import load_folder
from finetuning.data.schemas import CauldronRow, ConvertedRow, Picture, RowId, RowModel, Text, parse_row
from finetuning.errors import run_script
from finetuning.results.evaluation import evaluate, score_again
from finetuning.results.metrics import anls
from finetuning.results.predictions import Prediction
from finetuning.results.report import report_at_end, write_report
from finetuning.training.loading import load_model, load_processor
from finetuning.training.resume import begin_or_resume
from finetuning.training.summary import print_summary
from finetuning.training.trainer import RecipeTrainer

PROMPT = "{question}\nAnswer briefly."


def load_splits(args: RecipeArguments):
    """Rows to train on and rows to answer."""
    if args.data_dir:
        return load_folder(args, evaluation=("test", "val"))
    if args.full_train:
        train = load_hub(args, "HuggingFaceM4/the_cauldron", "docvqa")
    else:
        train = load_hub(args, "nielsr/docvqa_1200_examples")
    return train, load_hub(args, "nielsr/docvqa_1200_examples", split="test")


class Question(RowModel):
    en: Text


class DocVQARow(RowModel):
    """A page, a question and its acceptable answers."""

    id: RowId
    image: Picture
    query: Question
    answers: list[Text] = Field(min_length=1)


def to_conversation(row: dict) -> Conversation:
    """One page and its question; the_cauldron's rows ask several questions about a page, one a turn."""
    parsed = parse_row(row, ConvertedRow, CauldronRow, DocVQARow)
    if isinstance(parsed, ConvertedRow):
        return parsed.to_conversation()
    if isinstance(parsed, CauldronRow):
        # There a full stop follows each answer.
        turns = [
            Turn(PROMPT.format(question=text.question), [text.assistant.removesuffix(".")]) for text in parsed.texts
        ]
        turns[0].images = parsed.images
    else:
        turns = [Turn(PROMPT.format(question=parsed.query.en), parsed.answers, [parsed.image])]
    return Conversation(parsed.id, turns)


def score(predictions: list[Prediction]) -> dict[str, float]:
    """ANLS over all questions."""
    return {"anls": sum(anls(item.answer, item.references) for item in predictions) / len(predictions)}


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
