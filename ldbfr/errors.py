"""What can go wrong for a user, as four kinds of error with one root.

An error's text names the value that was given, what was expected, and the next step.
"""


class LDBFRError(Exception):
    """The root of every error that ldbfr raises on purpose."""


class InputError(LDBFRError):
    """An input (an image, a folder, a data set) cannot be used."""


class ConfigError(LDBFRError):
    """A setting is unknown, out of range, or does not fit another setting."""


class WeightsError(LDBFRError):
    """Weights or a checkpoint are missing, damaged, or belong to another preset."""


class StorageError(LDBFRError):
    """A file, folder or bucket cannot be read or written."""
