"""The rows of each epoch of a mixture, against a naive loop."""

import math
from collections import Counter

import pytest
import recipe
from hypothesis import given
from hypothesis import strategies as st

from finetuning.arguments import parse_args
from finetuning.data.mixture import Mixture, MixtureSampler
from finetuning.data.sampler import StepSampler
from finetuning.errors import InputError
from finetuning.own_data_arguments import OwnDataArguments

SIZES = st.lists(st.integers(1, 13), min_size=1, max_size=4)
SHARES = st.sampled_from([0.07, 0.1, 1 / 3, 0.5, 0.75, 1, 1.5, 2, 2.25])


def naive_epochs(rows: list[int], share: float, epochs: int) -> list[list[int]]:
    """What each epoch takes of these rows: one after another, round and round."""
    per_epoch, found, at = math.ceil(round(share * len(rows), 6)), [], 0
    for _ in range(epochs):
        found.append([])
        for _ in range(per_epoch):
            found[-1].append(rows[at])
            at = at + 1 if at + 1 < len(rows) else 0
    return found


@given(SIZES, st.data(), st.integers(0, 5), st.randoms())
def test_epochs_are_those_of_a_loop_through_each_source(sizes, data, seed, chance):
    shares = {f"s{number}": data.draw(SHARES) for number in range(len(sizes))}
    of_row = [name for name, size in zip(shares, sizes, strict=True) for _ in range(size)]
    chance.shuffle(of_row)
    mixture = Mixture(of_row, shares, seed)
    assert sorted(mixture.names) == sorted(shares)
    epochs = [mixture.epoch(number).tolist() for number in range(6)]
    # Any epoch by itself, as after a resumption.
    assert mixture.epoch(3).tolist() == Mixture(of_row, shares, seed).epoch(3).tolist() == epochs[3]
    for name, share in shares.items():
        own = [number for number, source in enumerate(of_row) if source == name]
        found = [[row for row in epoch if of_row[row] == name] for epoch in epochs]
        order = list(dict.fromkeys(row for epoch in found for row in epoch))
        if len(order) == len(own):  # else six epochs do not take all of its rows
            assert sorted(order) == own
            assert found == naive_epochs(order, share, 6)
        for epoch in found:
            counts = Counter(epoch)
            assert all(count <= math.ceil(share) for count in counts.values())
            if share >= 1:
                assert set(counts) == set(own)
    assert {len(epoch) for epoch in epochs} == {len(mixture)}
    assert len(mixture) == sum(math.ceil(round(shares[name] * count, 6)) for name, count in Counter(of_row).items())


@pytest.mark.parametrize("rows", [6, 7])
def test_half_of_the_rows_is_the_other_half_in_the_next_epoch(rows):
    mixture = Mixture(["a"] * rows, {"a": 0.5}, 0)
    first, second = set(mixture.epoch(0).tolist()), set(mixture.epoch(1).tolist())
    assert first | second == set(range(rows))
    assert len(first & second) == rows % 2


def test_rows_of_one_and_a_half_come_once_and_half_of_them_again():
    mixture = Mixture(["a"] * 8, {"a": 1.5}, 0)
    twice = [{row for row, count in Counter(mixture.epoch(n).tolist()).items() if count == 2} for n in range(2)]
    assert len(twice[0]) == len(twice[1]) == 4
    assert not twice[0] & twice[1]


def test_even_shares_give_as_many_samples_as_there_are_rows():
    mixture = Mixture(["a"] * 10 + ["b"] * 2 + ["c"] * 3, None, 0)
    assert mixture.samples == [5, 5, 5]
    assert Counter(mixture.epoch(0).tolist())[10] in (2, 3)


def test_another_seed_takes_other_rows():
    assert not Mixture(["a"] * 100, {"a": 0.1}, 0).epoch(0).equal(Mixture(["a"] * 100, {"a": 0.1}, 1).epoch(0))


def test_a_sampler_shuffles_the_sources_anew_in_each_epoch_and_gives_an_epoch_again():
    mixture = Mixture(["a"] * 20 + ["b"] * 20, {"a": 0.5, "b": 2}, 3)
    sampler = MixtureSampler(mixture, 3)
    epochs = []
    for number in (0, 1, 0):
        sampler.set_epoch(number)
        epochs.append(list(sampler))
    assert epochs[0] == epochs[2] != epochs[1]
    assert len(sampler) == len(epochs[0]) == 50
    assert sorted(epochs[0]) == sorted(mixture.epoch(0).tolist())
    firsts = [row < 20 for row in epochs[0]]
    assert firsts != sorted(firsts, reverse=True), "one source after another"


def test_steps_are_cut_from_an_epoch_of_the_mixture():
    mixture = Mixture(["a"] * 6 + ["b"] * 4, {"a": 0.5, "b": 2}, 0)
    sampler = StepSampler(MixtureSampler(mixture, 0), lambda row: row + 1, 4, 1, 2)
    sampler.set_epoch(1)
    places = list(sampler)
    assert len(places) == len(sampler)
    assert sorted(row for row in places if row is not None) == sorted(mixture.epoch(1).tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    recipe.model_folder(folder / "model")
    for name in ("docs", "receipts", "more/docs"):
        (folder / name).mkdir(parents=True)
        recipe.write_jsonl(folder / name / "train.jsonl", [{"question": "?", "answer": name}] * 3)
    return folder


@pytest.fixture(autouse=True)
def own_process(tmp_path, monkeypatch):
    yield from recipe.own_process(tmp_path, monkeypatch)


def own_arguments(folder, *flags: str) -> OwnDataArguments:
    return parse_args(
        ["--model_name_or_path", str(folder / "model"), "--no-tqdm", "--output_dir", "output", *flags], OwnDataArguments
    )


def test_shares_are_told_by_the_sources_names(folder):
    docs, receipts, more = (str(folder / name) for name in ("docs", "receipts", "more/docs"))
    assert own_arguments(folder, "--data_dir", docs).shares == {"": 1}
    assert own_arguments(folder, "--data_dir", f"{docs}:0.5").shares == {"": 0.5}
    assert own_arguments(folder, "--data_dir", docs, f"{receipts}:2").shares == {"docs": 1, "receipts": 2}
    assert own_arguments(folder, "--data_dir", f"{docs}:.5", more).shares == {"docs-1": 0.5, "docs-2": 1}
    assert own_arguments(folder, "--data_dir", docs, receipts, "--mixture", "even").shares is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_dir", "DIR/docs:0"], "expected a share over 0 after the colon"),
        (["--data_dir", "DIR/docs:half"], "expected a share over 0 after the colon"),
        (
            ["--data_dir", "DIR/docs:2", "DIR/receipts", "--mixture", "even"],
            "--mixture even with --data_dir .*docs:2: expected one of them",
        ),
        (["--data_dir", "DIR/docs", "--mixture", "even"], "--mixture even: expected several --data_dir, found one"),
        (["--data_dir", "DIR/docs", "--num_frames", "0"], "--num_frames 0: expected a whole number from 1 to 64"),
    ],
)
def test_a_share_that_makes_no_sense_is_one_line(folder, flags, message):
    with pytest.raises(InputError, match=message):
        own_arguments(folder, *(flag.replace("DIR", str(folder)) for flag in flags))


def test_each_epoch_has_an_order_of_its_own():
    # whole shares: the samples of all epochs are the same
    sampler = MixtureSampler(Mixture(["a"] * 20 + ["b"] * 20, {"b": 2}), seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert len({tuple(sorted(order)) for order in orders}) == 1
    assert len({tuple(order) for order in orders}) == 3
