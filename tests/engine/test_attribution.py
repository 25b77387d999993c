"""Sources are asked in order, until one answers."""

from tunsplit.engine.attribution import Attribution, Certainty, Owner, search_all
from tunsplit.process import Process

UDP = 17
KEY = bytes(12)

somebody = Owner((Process(100, 1, 1, 0, None), Process(200, 1, 1, 0, None)), Certainty.SHARED)
answer = Attribution("socket", somebody, b"cookie")


class Says:
    """A source that searches in these steps."""

    def __init__(self, *steps):
        self.steps = steps
        self.asked = []

    def attribute(self, protocol, four_tuple):
        return None

    def search(self, protocol, four_tuple):
        self.asked.append((protocol, four_tuple))
        yield from self.steps


def test_the_first_answer_ends_the_search():
    later = Says(Attribution("never asked", None))
    assert [None, None, answer] == list(search_all((Says(None), Says(None, answer, None), later), UDP, KEY))
    assert [] == later.asked


def test_nobody_answers():
    first, second = Says(), Says(None)
    assert [None] == list(search_all((first, second), UDP, KEY))
    assert [(UDP, KEY)] == first.asked == second.asked


def test_an_answer_without_an_owner_says_gone():
    assert Certainty.GONE is Attribution("socket", None).certainty


def test_an_answer_is_as_certain_as_its_owner():
    assert Certainty.SHARED is answer.certainty


def test_the_first_holder_is_shown():
    assert 100 == somebody.process.pid
