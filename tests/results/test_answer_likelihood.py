"""How likely a model finds its own answer: what counts of a batch whose answers end at different places."""

from types import SimpleNamespace

import pytest
import tiny
import torch

from finetuning.results.answer_likelihood import _greedy

END, PAD = tiny.TOKENIZER.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])


def test_an_answer_counts_to_its_end_and_one_that_is_cut_to_where_it_was_cut():
    one, two = tiny.TOKENIZER.convert_tokens_to_ids(["a", "b"])
    answers = torch.tensor([[one, END, PAD, PAD], [one, two, one, two], [END, PAD, PAD, PAD], [PAD, PAD, PAD, PAD]])
    logits = torch.randn(4, 4, len(tiny.TOKENIZER), generator=torch.Generator().manual_seed(0))
    model = SimpleNamespace(
        generate=lambda **_: SimpleNamespace(
            sequences=torch.cat((torch.ones(4, 3, dtype=torch.long), answers), 1), logits=tuple(logits.unbind(1))
        ),
        generation_config=SimpleNamespace(eos_token_id=[PAD, END]),
    )
    texts, found = _greedy(model, tiny.processor(), {"input_ids": torch.ones(4, 3, dtype=torch.long)}, 4)
    assert texts == ["a", "abab", "", ""]
    scores = logits.double().log_softmax(-1)
    for row, counted in enumerate((2, 4, 1, 1)):
        values = [float(scores[row, step, answers[row, step]]) for step in range(counted)]
        assert found[row] == pytest.approx(sum(values) / counted, abs=1e-5)
