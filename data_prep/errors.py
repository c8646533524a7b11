"""Errors of data preparation. A UserError is the user's to mend; it ends a command with code 2."""


class UserError(Exception):
    """The user's mistake: the message says what was given, what is allowed and what to do.

    Attributes:
        is_everybodys: raised on all ranks alike, so that one of them need tell it.
    """

    is_everybodys = False


class DataError(UserError):
    """An input that cannot be read or cleaned as asked."""


class ShardError(DataError):
    """A shard or manifest that is missing, broken or not what the model needs."""
