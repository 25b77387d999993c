"""How many descriptors this process may have open (getrlimit(2)).

Some facts about it: the soft limit is 1024 nearly everywhere, for the sake of select(2), and the hard one half a
million under systemd. Whoever uses no select(2) may raise the one to the other. Connections and sockets to resolvers
are bounded one by one, but together, for several users, they can be more than 1024; and a process that cannot open
/proc can judge nobody.
"""

import resource


def raise_descriptor_limit() -> None:
    """Have as many as we may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
