"""How likely a model finds answers: mean log-probability per token, of what it says itself and of what it is given."""

from collections.abc import Sequence

import torch

from phi3v import Phi3VProcessor


@torch.no_grad()
def answer_and_judge(
    model, processor: Phi3VProcessor, inputs, given: Sequence[Sequence[str]], max_new_tokens: int
) -> list[tuple[str, float, list[float]]]:
    """Answers prompts greedily, and finds how likely that answer is and how likely the given ones are.

    A likelihood is the mean log-probability of the answer's tokens and of the `<|end|>` after it, the tokens that are trained, in
    nats; an answer that `max_new_tokens` cuts short has no `<|end|>`.

    Args:
        model: model or PEFT model, on its device.
        processor (Phi3VProcessor): its tokenizer counts.
        inputs: left-padded batch of B prompts, on the model's device.
        given (Sequence[Sequence[str]]): the acceptable answers to each prompt, at least one.
        max_new_tokens (int): longest greedy answer, in tokens.

    Returns:
        list: for each prompt the greedy answer, its likelihood, and those of the given answers.
    """
    texts, own = _greedy(model, processor, inputs, max_new_tokens)
    likelihoods: list[list[float]] = [[] for _ in given]
    for place in range(max(map(len, given))):
        # A prompt with fewer answers takes part with its first, so that all batches are alike.
        answers = [choices[min(place, len(choices) - 1)] for choices in given]
        for found, choices, value in zip(likelihoods, given, _given(model, processor, inputs, answers), strict=True):
            if place < len(choices):
                found.append(value)
    return list(zip(texts, own, likelihoods, strict=True))


def _greedy(model, processor: Phi3VProcessor, inputs, max_new_tokens: int) -> tuple[list[str], list[float]]:
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        synced_gpus=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    answers = output.sequences[:, inputs["input_ids"].shape[1] :]  # (B, N)
    # A step at a time: all logits in float32 would take as much memory again.
    scores = torch.stack(
        [_log_probability(logits, answers[:, step]) for step, logits in enumerate(output.logits)], dim=1
    )  # (B, N)
    ends = torch.isin(answers, torch.tensor(model.generation_config.eos_token_id, device=answers.device))
    # What follows the first end is padding.
    counted = (ends.cumsum(1) - ends.long()) == 0
    texts = processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
    means = (scores * counted).sum(1) / counted.sum(1)
    return [text.strip() for text in texts], means.tolist()


def _given(model, processor: Phi3VProcessor, inputs, answers: Sequence[str]) -> list[float]:
    """Mean log-probability of an answer, and its `<|end|>`, to each prompt."""
    # Tokenized as it stands after the prompt.
    start = len(processor.tokenize("<|assistant|>\n"))
    tokens = [processor.tokenize(f"<|assistant|>\n{answer}<|end|>")[start:] for answer in answers]
    longest, device = max(map(len, tokens)), inputs["input_ids"].device
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], device=device)  # (B, longest)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens], device=device)
    longer = {
        **inputs,
        "input_ids": torch.cat((inputs["input_ids"], ids), dim=1),
        "attention_mask": torch.cat((inputs["attention_mask"], mask), dim=1),
    }
    logits = model(**longer, logits_to_keep=longest + 1, use_cache=False).logits[:, :-1]  # (B, longest, V)
    return ((_log_probability(logits, ids) * mask).sum(1) / mask.sum(1)).tolist()


def _log_probability(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability of tokens (...) by logits (..., V), in nats."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
