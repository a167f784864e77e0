"""What a script says in one line, and ends with."""


class Interrupted(Exception):
    """Ctrl-C, after what was finished has been written. The message says what that is."""


class UserError(ValueError):
    """Something in the input is wrong. The message is one line: what, where, and what would do."""


class CannotWrite(UserError, OSError):
    """A file cannot be written, and the message names it. An OSError, for who has more to say."""
