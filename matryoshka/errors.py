"""Exceptions that end a script with one line on stderr."""


class Interrupted(Exception):
    """Ctrl-C, after finished work has been written. The message says what was written."""


class UserError(ValueError):
    """Wrong input. The message is one line that says what is wrong, where, and what to do."""


class CannotWrite(UserError, OSError):
    """A file cannot be written; the message names it. Also an OSError, which callers can catch."""
