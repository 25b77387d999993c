"""What one user may have of what is everybody's."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tunsplit.engine.shares import Shares

SIZE = 8


@given(st.lists(st.tuples(st.sampled_from((None, 0, 1000)), st.booleans()), max_size=60))
def test_nobody_has_more_than_three_quarters_and_all_that_is_given_back_may_be_had_again(steps):
    shares = Shares({"flows": SIZE, "tcp": 0})
    had: Counter[int | None] = Counter()
    for user, takes in steps:
        assert shares.has_room("flows", user) == (had[user] < 6)
        assert not shares.has_room("tcp", user)
        if takes and shares.has_room("flows", user):
            shares.take("flows", user)
            had[user] += 1
        elif not takes and had[user]:
            shares.give_back("flows", user)
            had[user] -= 1
