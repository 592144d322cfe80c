"""The one exception that means "the user can mend this"."""


class InputError(ValueError):
    """Wrong input from the user: one line that names the file or key, the value and the mend. The CLI exits with 2."""


class StageFailure(RuntimeError):
    """A stage went wrong in a way that a rerun would repeat (diverged, guard said stop). The CLI exits with 1."""


class NoRoom(StageFailure):
    """The cluster had no room for it for as long as the settings allow."""
