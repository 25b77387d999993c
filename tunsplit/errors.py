"""What can go wrong, by who has to act on it; each kind has its own exit code."""


class TunsplitError(Exception):
    """An error with a message for the user, and the exit code that the command ends with."""

    exit_code = 1


class ConfigError(TunsplitError):
    """The configuration is wrong: which file and key, what was found, what to write instead."""

    exit_code = 2


class PermissionMissing(TunsplitError):
    """A capability is missing: which one, and how to grant it."""

    exit_code = 3


class KernelError(TunsplitError):
    """The kernel or a program that we need is missing or said no: which call, which errno, what to install."""

    exit_code = 4


class NotRunning(TunsplitError):
    """No daemon answers on the control socket."""

    exit_code = 5


class MalformedPacket(Exception):
    """Bytes from outside that are no packet. Raised in wire/, caught by its caller, counted, never logged singly."""
