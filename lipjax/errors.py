"""The two errors that users meet: a mistake in what they gave, and a claim that cannot be proved."""


class UserError(ValueError):
    """Bad input (a config value, a data set, a checkpoint, images): the command line prints it and exits with code 2.

    The message says what was expected, what came and what to do.
    """


class NotCertifiable(ValueError):
    """A layer or network has no proved bound; the message names the layer and the reason."""
