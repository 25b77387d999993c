"""Sources are asked in order, until one answers."""

from tunsplit.engine.attribution import Attribution, Certainty, Owner, search_all
from tunsplit.process import Process

ONE, OTHER = (17, bytes(12)), (6, bytes(12))

somebody = Owner((Process(100, 1, 1, 0, None), Process(200, 1, 1, 0, None)), Certainty.SHARED)
answer = Attribution("socket", somebody, b"cookie")


class Says:
    """A source that searches in these steps: flows that have an answer, or None."""

    def __init__(self, *steps):
        self.steps = steps
        self.asked = []

    def attribute(self, protocol, four_tuple):
        return None

    def search(self, flows):
        self.asked.append(tuple(flows))
        yield from (None if step is None else (step, answer) for step in self.steps)


def test_the_first_answer_ends_the_search():
    later = Says()
    found = list(search_all((Says(None), Says(None, ONE, None), later), [ONE]))
    assert [None, None, (ONE, answer), None] == found
    assert [] == later.asked


def test_the_next_source_searches_for_those_who_are_left():
    first, second = Says(OTHER), Says(ONE)
    assert [(OTHER, answer), (ONE, answer)] == list(search_all((first, second), [ONE, OTHER]))
    assert [(ONE, OTHER)] == first.asked
    assert [(ONE,)] == second.asked


def test_nobody_answers():
    first, second = Says(), Says(None)
    assert [None] == list(search_all((first, second), [ONE]))
    assert [(ONE,)] == first.asked == second.asked


def test_an_answer_without_an_owner_says_gone():
    assert Certainty.GONE is Attribution("socket", None).certainty


def test_an_answer_is_as_certain_as_its_owner():
    assert Certainty.SHARED is answer.certainty


def test_the_first_holder_is_shown():
    assert 100 == somebody.process.pid
