"""generate() against the official model: greedy ids and the scores they were chosen by."""

import numpy as np
import pytest
import torch
from golden import LOGIT_BOUND, arrays, case, check, input_ids, names, pixels

CASES = names("generation")


@pytest.mark.parametrize("name", CASES)
def test_greedy_ids_and_scores_are_the_official_ones(name, golden_model, record_property):
    recorded = arrays("generation")
    prompt = input_ids(recorded[f"{name}/input_ids"]).view(1, -1)
    outputs = golden_model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        **pixels(case("generation", name)),
        do_sample=False,
        max_new_tokens=12,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert outputs.sequences[0, prompt.shape[1] :].tolist() == case("generation", name)["new_ids"]
    logits = torch.cat(outputs.logits)  # (12, V)
    first_and_last = np.stack([recorded[f"{name}/{step}_scores_first64"].reshape(-1) for step in ("first", "last")])
    check(record_property, "generation: logits", logits[[0, -1], :64], first_and_last)
    best = logits.topk(2).values
    check(record_property, "generation: margin", best[:, 0] - best[:, 1], recorded[f"{name}/margin"], 2 * LOGIT_BOUND)


def test_all_three_prompts_in_one_batch_give_the_same_ids(golden_model):
    """Text, an image, and a prompt that crosses 4096 tokens while the others stay short."""
    golden_model.set_attn_implementation("sdpa")
    prompts = [input_ids(arrays("generation")[f"{name}/input_ids"]).view(-1) for name in CASES]
    batch = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=32000, padding_side="left")
    mask = torch.stack([torch.arange(batch.shape[1]) >= batch.shape[1] - len(prompt) for prompt in prompts]).long()
    (images,) = [found for name in CASES if (found := pixels(case("generation", name)))]
    new = golden_model.generate(input_ids=batch, attention_mask=mask, **images, do_sample=False, max_new_tokens=12)
    assert new[:, batch.shape[1] :].tolist() == [case("generation", name)["new_ids"] for name in CASES]


def test_without_a_cache_the_ids_are_the_same(golden_model):
    prompt = input_ids(arrays("generation")["gen_text/input_ids"]).view(1, -1)
    mask = torch.ones_like(prompt)
    new = golden_model.generate(input_ids=prompt, attention_mask=mask, use_cache=False, max_new_tokens=12)
    assert new[0, prompt.shape[1] :].tolist() == case("generation", "gen_text")["new_ids"]
