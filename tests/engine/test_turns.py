"""Users take turns."""

from hypothesis import given
from hypothesis import strategies as st

from tunsplit.engine.turns import Turns


def key(number):
    return 17, number.to_bytes(12, "big")


def test_who_waits_alone_is_next_however_many_others_have():
    turns = Turns()
    for number in range(100):
        turns.add(1000, key(number))
    turns.add(1001, key(200))
    turns.add(None, key(300))

    assert [key(0), key(200), key(300), key(1)] == turns.take(4)
    turns.add(1001, key(201))
    assert [key(2), key(201)] == turns.take(2)


def test_nobody_waits():
    turns = Turns()
    assert not turns
    turns.add(1000, key(0))
    assert turns
    assert [key(0)] == turns.take(5)
    assert (False, []) == (bool(turns), turns.take(5))


@given(st.lists(st.one_of(st.integers(0, 3), st.none(), st.just("take")), max_size=60), st.integers(1, 5))
def test_each_is_taken_once_in_its_user_s_order_and_nobody_waits_longer_than_a_round(steps, most):
    turns, taken = Turns(), []
    added: dict[int | None, list[tuple[int, bytes]]] = {}
    for number, step in enumerate(steps):
        if step != "take":
            turns.add(step, key(number))
            added.setdefault(step, []).append(key(number))
            continue
        waiting = {user: [one for one in keys if one not in taken] for user, keys in added.items()}
        users = [user for user, keys in waiting.items() if keys]
        now = turns.take(most)
        assert min(most, sum(len(keys) for keys in waiting.values())) == len(now)
        if most >= len(users):
            assert all(waiting[user][0] in now for user in users)
        taken += now
    taken += turns.take(len(steps) + 1)

    assert {user: [one for one in taken if one in keys] for user, keys in added.items()} == added
    assert sum(len(keys) for keys in added.values()) == len(taken)
