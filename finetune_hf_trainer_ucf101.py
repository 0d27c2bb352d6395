"""Fine-tunes Phi-3.5-vision to classify short videos, 8 frames each (UCF-101).

    python convert_ucf101.py --out_dir /path/to/converted_ucf101
    torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --data_dir /path/to/converted_ucf101 --bf16

Data: --data_dir with a folder that convert_ucf101.py has written, or any other in that form (README): NAME_train.jsonl,
NAME_val.jsonl, NAME_test.jsonl and images/. Answers val, or with --eval_split test the test split.

Metrics: accuracy, 0 to 1, and accuracy/CLASS of each class.

Written into --output_dir: weights or adapter and the processor, eval_before.json, eval_after.json, predictions.jsonl,
curves.png, confusion.png, report.html, checkpoint-N/. `--help` lists all flags.
"""

from pydantic import field_validator

from finetuning.arguments import RecipeArguments, parse_args
from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.conversation import Conversation
from finetuning.data.dataset import build_dataset
from finetuning.data.reading import load_folder
from finetuning.data.schemas import ConvertedRow, ConvertedTurn, parse_row
from finetuning.errors import InputError, run_script
from finetuning.results.evaluation import evaluate, score_again
from finetuning.results.metrics import exact_match
from finetuning.results.predictions import Prediction
from finetuning.results.report import report_at_end, write_report
from finetuning.training.loading import load_model, load_processor
from finetuning.training.resume import begin_or_resume
from finetuning.training.summary import print_summary
from finetuning.training.trainer import RecipeTrainer

# 8 frames of 5 crops at most: about 6,000 tokens a clip.
NUM_CROPS = 4


def load_splits(args: RecipeArguments):
    """Rows to train on and rows to answer."""
    if not args.data_dir:
        raise InputError(
            "--data_dir: expected the folder that `python convert_ucf101.py --out_dir DIR` writes, found none"
        )
    return load_folder(args, evaluation=("val", "test"))


class ClipRow(ConvertedRow):
    """{"id", "conversations": [{"images": paths of the frames, "user": the question, "assistant": the class}]}."""

    @field_validator("conversations")
    @classmethod
    def check_frames(cls, turns: list[ConvertedTurn]) -> list[ConvertedTurn]:
        """More turns may follow the one that shows the frames."""
        if not turns[0].images:
            raise ValueError("expected the frames of a clip as images of the first turn, found none")
        return turns


def to_conversation(row: dict) -> Conversation:
    """The frames of a clip are the images of its first turn, usually its only one."""
    return parse_row(row, ClipRow).to_conversation()


def score(predictions: list[Prediction]) -> dict[str, float]:
    """Accuracy, and of each class by itself."""
    right = [(item.references[0], exact_match(item.answer, item.references)) for item in predictions]
    figures = {"accuracy": sum(is_right for _, is_right in right) / len(right)}
    for name in sorted({name for name, _ in right}):
        of_class = [is_right for found, is_right in right if found == name]
        figures[f"accuracy/{name}"] = sum(of_class) / len(of_class)
    return figures


def main():
    args = parse_args(num_crops=NUM_CROPS)
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
