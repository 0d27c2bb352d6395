"""A question to one of several models: its words as they come, its end by a stop, a fault or a closed page."""

import threading
import time

import pytest
import recipe
import tiny
import torch

from finetuning.data.clips import most_crops
from finetuning.data.conversation import Turn
from finetuning.errors import InputError
from finetuning.results import chat
from finetuning.results.side_by_side import Answering, SideBySide
from finetuning.training.saved import find_saved
from finetuning.training.several import Loading, open_several

own_process = pytest.fixture(autouse=True)(recipe.own_process)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = recipe.model_folder(tmp_path_factory.mktemp("models") / "base")
    return open_several([Loading(find_saved(str(folder)), torch.float32, False)], torch.device("cpu"))


def ask(models, turns=(), question="What is it?", images=(), stopped=lambda: False, **how):
    return SideBySide(models).ask(0, list(turns), question, list(images), Answering(**how), stopped)


def test_the_words_add_up_to_the_answer_of_a_chat(models):
    *texts, (turn, reply) = ask(models, images=[tiny.picture(60, 40)], max_new_tokens=12)
    alone = chat.Chat(models[0].model, models[0].processor, torch.float32, 12)
    assert reply.text == alone.ask("What is it?", [tiny.picture(60, 40)]).text
    assert texts[-1].strip() == reply.text
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert turn.user == "What is it?"
    # the next question knows this one
    *_, (_, again) = ask(models, [turn], "And now?", max_new_tokens=12)
    assert again.text == alone.ask("And now?").text


def test_a_stop_ends_the_answer_and_keeps_what_is_written(models):
    count = iter(range(100))
    *_, (turn, reply) = ask(models, max_new_tokens=50, stopped=lambda: next(count) >= 3)
    assert reply.tokens == 4
    assert turn.answers


def test_a_temperature_draws(models):
    answers = {list(ask(models, max_new_tokens=8, temperature=2.0))[-1][1].text for _ in range(4)}
    assert len(answers) > 1


def test_crops_hold_for_one_answer(models, monkeypatch):
    before = models[0].processor.image_processor.num_crops
    assert before != 1
    taken = []

    def note(sources, num_crops):
        taken.append(num_crops)
        return most_crops(sources, num_crops)

    monkeypatch.setattr(chat, "most_crops", note)
    list(ask(models, images=[tiny.picture(90, 40)], num_crops=1, max_new_tokens=2))
    list(ask(models, images=[tiny.picture(90, 40)], max_new_tokens=2))
    assert taken == [1, before]


def test_a_fault_comes_up_where_the_answer_is_waited_for(models):
    with pytest.raises(InputError, match="control token"):
        list(ask(models, question="<|end|>"))
    with pytest.raises(InputError, match="the conversation"):
        list(ask(models, [Turn("What? " * 2000, ["-"])]))
    assert list(ask(models, max_new_tokens=2))


def test_a_page_that_is_closed_ends_the_answer(models):
    before = threading.active_count()
    question = ask(models, max_new_tokens=1500)
    next(question)
    start = time.monotonic()
    question.close()
    assert time.monotonic() - start < 5
    assert threading.active_count() == before


def test_one_is_asked_at_a_time(models):
    both = SideBySide(models)
    first = both.ask(0, [], "What is it?", [], Answering(max_new_tokens=1500), lambda: False)
    next(first)
    done = threading.Event()

    def second():
        list(both.ask(0, [], "What is it?", [], Answering(max_new_tokens=2), lambda: False))
        done.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert not done.wait(0.3)
    first.close()
    assert done.wait(20)
    thread.join()
