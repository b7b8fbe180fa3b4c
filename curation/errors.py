"""Errors by who must act.

    TilthError            exit 1: the run failed, nothing the user wrote is wrong
    ├── UserError         exit 2: a recipe, path or option is wrong; the message says what to change
    └── RunLocked         exit 2: another process writes to this run folder

Messages are one sentence: what was wrong, where, and what to do.
"""


class TilthError(Exception):
    """A failure that Tilth can name. Shown without a traceback."""

    exit_code = 1


class UserError(TilthError):
    """The user's mistake: a bad recipe, a missing input, an impossible budget."""

    exit_code = 2


class RunLocked(UserError):
    """The run folder has a writer already."""
