"""Fine-tunes Phi-3.5-vision by the score of its own answers, with TRL's GRPOTrainer (LoRA): the reward is a task's `score`.

    pip install -r requirements-trl.txt
    torchrun --nproc_per_node=8 finetune_trl_grpo.py --task docvqa --learning_rate 1e-5 --max_completion_length 64

Each question is answered --num_generations times; answers that score more than the others of their question become
likelier. So the model must be right now and then: begin with one that a task's script has trained.

Data: that of the task's script, whose `load_splits`, `to_conversation` and `score` are taken: --task docvqa, hateful_memes,
nlvr2, ucf101, or the path of a script of your own; --data_dir as there.

Metric: reward over the rows held back, before and after: the mean of the task's first figure over sampled answers, such
as ANLS, 0 to 1.

Written into --output_dir: the adapter and the processor, eval_before.json, eval_after.json, trainer_state.json (all
figures of training), checkpoint-N/. `--help` lists all flags: TRL's own, and the recipe's for model, data and LoRA.
"""

from finetuning.data.dataset import StartEpoch, build_dataset
from finetuning.data.questions import GroupProcessor, question_dataset
from finetuning.errors import run_script
from finetuning.results.reward import reward_of
from finetuning.results.trl_results import train_and_evaluate
from finetuning.task_script import load_script
from finetuning.training.loading import load_processor
from finetuning.training.trl_model import load_trl_model, trl_lora_config
from finetuning.trl_arguments import TaskArguments, import_trl, parse_trl_args


def main():
    args, settings = parse_trl_args("GRPOConfig", TaskArguments)
    task = load_script(args.task)
    reward = reward_of(task.score, args.task)
    processor = load_processor(args)
    train_rows, eval_rows = task.load_splits(args)
    train_dataset = build_dataset(train_rows, task.to_conversation, processor, args, split="train")
    eval_dataset = build_dataset(eval_rows, task.to_conversation, processor, args, split="eval")

    # Not shuffled by TRL, which would deal the rows in another order after a checkpoint.
    seed, settings.shuffle_dataset = settings.seed if settings.shuffle_dataset else None, False
    model = load_trl_model(args, settings)
    trainer = import_trl().GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=settings,
        train_dataset=question_dataset(train_dataset, seed),
        eval_dataset=question_dataset(eval_dataset),
        processing_class=GroupProcessor(processor.image_processor, processor.tokenizer),
        peft_config=trl_lora_config(model.config, args),
        callbacks=[StartEpoch()],
    )
    train_and_evaluate(trainer)


if __name__ == "__main__":
    run_script(main)
