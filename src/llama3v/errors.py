"""The errors a person meets. Each message says what was expected, what was found and what to do.

The command line prints them as one line and exits with code 2; anything else is a defect and keeps its traceback.
"""


class Llama3VError(Exception):
    """Base of every error that the user can mend."""


class ConfigError(Llama3VError):
    """Options that cannot work, alone or together."""


class ImageError(Llama3VError):
    """An image that cannot be read safely: the file, its header or its pixels."""


class DataError(Llama3VError):
    """A data file or a row of it that cannot be understood."""


class CacheError(Llama3VError):
    """A feature cache that is foreign, damaged or incomplete."""


class CheckpointError(Llama3VError):
    """A checkpoint or model directory that cannot be loaded."""


class PromptError(Llama3VError):
    """Turns, images or lengths that cannot be rendered as one prompt."""


class RankError(Llama3VError):
    """Another process of a run that several processes share is lost, stopped, or does not fit to this one."""
