"""Errors that are the user's to mend. Each is one line that names the file, key or row and says what to do."""


class Ending(BaseException):
    """What ends a command with one line and an exit code of its own; see `siesta.rl.exits`.

    Attributes:
        opening: What its line begins with.
        exit_code: Of the process.
    """

    opening = "siesta: error: "
    exit_code = 2


class UserError(Ending, Exception):
    """Bad input: printed without a traceback, exit code 2."""


class DataError(UserError):
    """A row or a data set that cannot be used."""


class RecipeError(UserError):
    """A recipe key or value that cannot be used."""


class ModelError(UserError):
    """A model, tokenizer or chat template that cannot be used."""


class LaunchError(UserError):
    """The processes are not what the launcher was asked for."""


class CheckpointError(UserError):
    """A checkpoint that cannot be resumed from, or one that cannot be written."""


class ReportError(UserError):
    """A run that cannot be reported on."""
