"""The one family of exceptions that a user's mistake can raise."""


class TdcError(Exception):
    """A mistake that the user can mend.

    The message says what was found, what was expected and what to do.  The command line prints
    it without a traceback and exits with status 1.
    """
