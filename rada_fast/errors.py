"""Errors that the command line shows as one line."""


class UserError(ValueError):
    """Something the user gave cannot be used: a file, a folder, an option, a value.

    The message is one line that names the argument, what was expected and what came. The command line prints it
    without a traceback and exits with status 2.
    """


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot serve the call; the message gives the reason."""


class SystemFailureError(RuntimeError):
    """The system ended something that a run needs, a process that reads images, say; the message is one line.

    What was finished is kept: the command line exits with status 1, and the same command goes on from there.
    """
