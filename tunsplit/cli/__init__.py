"""The command line: words in, exit code out. The only place that prints.

`base` is what all commands share, `daemon` what works without asking a daemon, `show` what a daemon is asked,
`switch` what it is told, `saving` how that gets into the configuration, `execute` is `tunsplit exec`,
`selftest` shows what is promised.

Imports inside the commands are meant: `tunsplit flows` needs no trio, and `tunsplit exec` next to nothing.
"""

from tunsplit.cli import daemon, execute, selftest, show, switch
from tunsplit.cli.base import main

__all__ = ["daemon", "execute", "main", "selftest", "show", "switch"]
