"""Fine-tunes Phi-3.5-vision to tell hateful memes from harmless ones (Hateful Memes).

    torchrun --nproc_per_node=8 finetune_hf_trainer_hateful_memes.py --bf16 --use_flash_attention --batch_size 64

Data: the_cauldron's hateful_memes, its first 500 rows to answer and the others to train; or --data_dir in the layout of the
original challenge (train.jsonl and dev.jsonl with {"id", "img", "label", "text"}, img/; --eval_split test where a test file has
labels), or with a converted folder (README).

Metrics: accuracy of the generated answers, 0 to 1; auroc, by which the challenge ranks, of the probability that the model
gives to "Yes" against "No".

Written into --output_dir: weights or adapter and the processor, eval_before.json, eval_after.json, predictions.jsonl,
curves.png, confusion.png, report.html, checkpoint-N/. `--help` lists all flags.
"""

from pydantic import Field
from sklearn.metrics import roc_auc_score

from finetuning.arguments import RecipeArguments, parse_args
from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.conversation import Conversation, Turn
from finetuning.data.dataset import build_dataset
from finetuning.data.hub import load_hub
from finetuning.data.reading import load_folder
from finetuning.data.schemas import CauldronRow, ConvertedRow, Picture, RowId, RowModel, Text, parse_row
from finetuning.errors import run_script
from finetuning.results.evaluation import evaluate, score_again
from finetuning.results.metrics import exact_match
from finetuning.results.predictions import Prediction
from finetuning.results.report import report_at_end, write_report
from finetuning.training.loading import load_model, load_processor
from finetuning.training.resume import begin_or_resume
from finetuning.training.summary import print_summary
from finetuning.training.trainer import RecipeTrainer

PROMPT = 'The text in this meme is "{text}". Is the meme hateful?\nAnswer yes or no.'
CHOICES = ["No.", "Yes."]
HELD_OUT = 500


def load_splits(args: RecipeArguments):
    """Rows to train on and rows to answer."""
    if args.data_dir:
        return load_folder(args, evaluation=("dev", "val", "test"))
    rows = load_hub(args, "HuggingFaceM4/the_cauldron", "hateful_memes")
    return rows.select(range(HELD_OUT, len(rows))), rows.select(range(HELD_OUT))


class MemeRow(RowModel):
    """A row of the challenge, 1 for hateful; its files without labels cannot be trained on."""

    id: RowId
    img: Picture
    text: Text
    label: int = Field(ge=0, le=1)


def to_conversation(row: dict) -> Conversation:
    """One meme and its text; the answer is yes or no."""
    parsed = parse_row(row, ConvertedRow, CauldronRow, MemeRow)
    if isinstance(parsed, ConvertedRow):
        conversation = parsed.to_conversation()
    elif isinstance(parsed, CauldronRow):
        text = parsed.texts[0]
        conversation = Conversation(parsed.id, [Turn(text.user, [text.assistant], parsed.images)])
    else:
        turn = Turn(PROMPT.format(text=parsed.text), [CHOICES[parsed.label]], [parsed.img])
        conversation = Conversation(parsed.id, [turn])
    for turn in conversation.turns:
        turn.choices = CHOICES
    return conversation


def score(predictions: list[Prediction]) -> dict[str, float]:
    """Accuracy, and AUROC where both answers occur."""
    figures = {"accuracy": sum(exact_match(item.answer, item.references) for item in predictions) / len(predictions)}
    labels = [exact_match("Yes", item.references) for item in predictions]
    if len(set(labels)) == 2:
        hateful = [item.choices["Yes."] - item.choices["No."] for item in predictions]
        figures["auroc"] = float(roc_auc_score(labels, hateful))
    return figures


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
