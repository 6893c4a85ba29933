"""Define the errors that the command line shows as one line."""


class UserError(ValueError):
    """This error reports a file, a folder, an option or another value from the user that cannot be used.

    The message is one line that names the argument, what was expected and what was found. The command line prints it
    without a traceback and exits with status 2.
    """


class BackendUnavailableError(RuntimeError):
    """This error says why the backend that was chosen by name cannot serve a call."""
