"""Errors that the command line shows as one line."""


class UserError(ValueError):
    """Something the user gave cannot be used: a file, a folder, an option, a value.

    The message is one line that names the argument, what was expected and what came. The command line prints it
    without a traceback and exits with status 2.
    """


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot serve the call; the message gives the reason."""
