"""Lengths of trained conversations in tokens, many at once and without pixels: what training sorts by and `validate` counts."""

from collections.abc import Sequence
from typing import Any

from phi3v import Phi3VProcessor
from phi3v.processing_phi3_v import IMAGE_TAG, find_tags

from .conversation import Conversation, to_messages


def longest_answers(conversations: Sequence[Conversation], tokenizer: Any) -> list[list[str]]:
    """For each conversation the longest answer of each turn, in tokens as they are trained; without a tokenizer in characters."""
    several = [turn.answers for item in conversations for turn in item.turns if len(turn.answers) > 1]
    texts = [answer for answers in several for answer in answers]
    # With the tokens around it: <|assistant|> takes the white space that begins an answer.
    framed = [f"<|assistant|>\n{answer}<|end|>" for answer in texts]
    length = dict(zip(texts, text_lengths(framed, tokenizer), strict=True))
    return [
        [max(turn.answers, key=lambda answer: length.get(answer, 0)) for turn in item.turns] for item in conversations
    ]


def conversation_lengths(
    conversations: Sequence[Conversation], image_tokens: Sequence[Sequence[int]], processor: Phi3VProcessor
) -> list[int]:
    """Length of each conversation as it is trained, with its longest answers, in tokens.

    Args:
        conversations (Sequence[Conversation]): that `check_conversation` has passed.
        image_tokens (Sequence[Sequence[int]]): for each conversation the tokens of its image 1, image 2, ...
        processor (Phi3VProcessor): its tokenizer counts.
    """
    if not conversations:
        return []
    longest = longest_answers(conversations, processor.tokenizer)
    messages = [to_messages(item, answers) for item, answers in zip(conversations, longest, strict=True)]
    # As `Phi3VProcessor.tokenize` does it: the texts between tags are tokenized by themselves.
    texts = processor.apply_chat_template(messages)
    chunks = [IMAGE_TAG.split(text)[::2] for text in texts]
    counts = iter(text_lengths([chunk for row in chunks for chunk in row], processor.tokenizer))
    lengths = []
    for row, text, tokens in zip(chunks, texts, image_tokens, strict=True):
        images = sum(tokens[number - 1] for number in find_tags(text, len(tokens)))
        lengths.append(sum(next(counts) for _ in row) + images + 1)  # and <|endoftext|>
    return lengths


def text_lengths(texts: list[str], tokenizer: Any) -> list[int]:
    """Tokens of each text, BOS included; without a tokenizer its characters."""
    if tokenizer is None:
        return [len(text) for text in texts]
    # Three times as fast as tokenizer(), which makes masks and copies of all ids; prompts and classes come again and again.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    unique = list(dict.fromkeys(texts))
    lengths = dict(zip(unique, map(len, tokenizer.backend_tokenizer.encode_batch_fast(unique)), strict=True))
    return [lengths[text] for text in texts]
