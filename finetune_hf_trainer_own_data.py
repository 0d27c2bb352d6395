"""Fine-tunes Phi-3.5-vision on your own questions and answers about pictures, in the form that you have them in.

    torchrun --nproc_per_node=2 finetune_hf_trainer_own_data.py --data_dir my_pages --use_lora --bf16
    torchrun --nproc_per_node=2 finetune_hf_trainer_own_data.py --data_dir pages.csv --columns image=path question=frage answer=antwort

Data: --data_dir with folders or files (jsonl, json, csv, Parquet), or --dataset with a data set on the hub. Rows are LLaVA's or
ShareGPT's conversations, OpenAI's or TRL's messages, the native form (README), or columns image, question, answer;
docs/own-data.md shows each. Files or rows of a split test or val are answered, without any --eval_share of the rows.

Metric: --metric anls, exact_match, rouge_l or contains, each 0 to 1, the mean over all answers; by default the one that fits the
answers' length. Always the loss (nats per token of the given answers) and the token accuracy (share of these tokens that the
model finds likeliest).

Written into --output_dir: weights or adapter and the processor, eval_before.json, eval_after.json, predictions.jsonl,
curves.png, report.html, checkpoint-N/. `--help` lists all flags.
"""

from finetuning.arguments import parse_args
from finetuning.data.collator import DataCollatorForPhi3V
from finetuning.data.conversation import Conversation
from finetuning.data.dataset import build_dataset
from finetuning.data.known_forms import known_conversation
from finetuning.data.own_splits import load_own_data
from finetuning.errors import run_script
from finetuning.own_data_arguments import OwnDataArguments
from finetuning.results.choosing import choose_metric
from finetuning.results.evaluation import check_score, evaluate, score_again, score_while_training
from finetuning.results.metrics import METRICS
from finetuning.results.predictions import Prediction
from finetuning.results.report import report_at_end, write_report
from finetuning.training.loading import load_model, load_processor
from finetuning.training.resume import begin_or_resume
from finetuning.training.summary import print_summary
from finetuning.training.trainer import RecipeTrainer

# What --metric names; `load_splits` notes it.
chosen_metrics: list[str] = []


def load_splits(args: OwnDataArguments):
    """Rows to train on and rows to answer."""
    train, evaluation = load_own_data(args)
    chosen_metrics[:] = args.metric or choose_metric(evaluation, to_conversation)
    return train, evaluation


def to_conversation(row: dict) -> Conversation:
    """A row of any of the forms that are known."""
    return known_conversation(row)


def score(predictions: list[Prediction]) -> dict[str, float]:
    """The mean of each metric over all answers."""
    scores = {name: [METRICS[name](item.answer, item.references) for item in predictions] for name in chosen_metrics}
    return {name: sum(values) / len(values) for name, values in scores.items()}


def main():
    args = parse_args(kind=OwnDataArguments)
    processor = load_processor(args)
    train_rows, eval_rows = load_splits(args)
    train_dataset = build_dataset(train_rows, to_conversation, processor, args, split="train")
    eval_dataset = build_dataset(eval_rows, to_conversation, processor, args, split="eval")
    check_score(eval_dataset, score, args)
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
        score_answers=score_while_training(score, args),
    )
    with report_at_end(trainer, __doc__, eval_dataset, score):
        evaluate(model, eval_dataset, score, args, stage="before")
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        evaluate(model, eval_dataset, score, args, stage="after")


if __name__ == "__main__":
    run_script(main)
