"""What a user did that cannot work, told without a trace."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: the message names what was found, what is allowed and what to do. The CLI shows it without a trace."""

    exit_code = 2  # the same command would fail again


class LostError(UserError):
    """A process, a node or a connection was lost: nothing is wrong with the input, and the same command resumes."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h; a launcher may start the run again


class ConfigError(UserError):
    """A setting that cannot work; the message names the key, the value, the limit and the way out."""
