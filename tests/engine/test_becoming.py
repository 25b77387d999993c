"""Who may have sent a packet, and be gone."""

import pytest

from tests.engine.story import Story
from tunsplit.engine import becoming
from tunsplit.engine.becoming import Becoming


@pytest.fixture
def tree():
    story = Story()
    for parent, child in ((1, 10), (10, 11), (10, 12)):
        story.fork(parent, child)
    return story.tree


@pytest.fixture
def became():
    return Becoming()


def who(became, node, mark=None):
    return sorted(one.pid for one in became.heirs_and_givers(node, became.mark if mark is None else mark))


def test_the_dead_are_known_to_ancestors_and_descendants(tree, became):
    parent, child, sibling = (tree.find(pid, pid) for pid in (10, 11, 12))
    assert not became.since(became.mark)
    became.note(child)
    assert became.since(became.mark)
    assert [[11], [], []] == [who(became, one) for one in (parent, child, sibling)]
    became.note(parent)
    assert [[11], [], []] == [who(became, one) for one in (parent, child, sibling)]  # it is another, and lives
    tree.exit(10, 10, 10_000)
    assert [[11], [10], [10]] == [who(became, one) for one in (parent, child, sibling)]

    became.carried(emptied=True, held=())
    assert not became.since(became.mark)
    assert [[], [], []] == [who(became, one) for one in (parent, child, sibling)]


def test_what_is_held_is_as_old_as_when_it_was_read(tree, became):
    parent, child, sibling = (tree.find(pid, pid) for pid in (10, 11, 12))
    held = became.mark
    became.note(child)
    became.carried(emptied=True, held=[held])
    assert ([11], []) == (who(became, parent, held), who(became, parent))
    became.note(sibling)
    became.carried(emptied=True, held=[1])
    assert [12] == who(became, parent, held)


def test_a_tun_that_is_never_empty_is_a_queue(tree, became, monkeypatch):
    monkeypatch.setattr(becoming, "TURNS", 2)
    became.note(tree.find(11, 11))
    parent = tree.find(10, 10)
    for _ in range(3):
        became.carried(emptied=False, held=())
        assert [11] == who(became, parent)
    became.carried(emptied=False, held=())
    assert [] == who(became, parent)


def test_with_too_many_it_may_be_anybody(tree, became, monkeypatch):
    monkeypatch.setattr(becoming, "MOST", 2)
    child = tree.find(11, 11)
    for expected in (False, False, True):
        became.note(child)
        assert expected is became.unknown_since(became.mark)
    assert [11] == who(became, tree.find(10, 10))
    became.carried(emptied=True, held=())
    assert not became.unknown_since(became.mark)
