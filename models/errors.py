"""What models/ raises when its input is wrong: each message names the thing and the remedy."""

__all__ = ["DataError", "TaskError"]


class TaskError(ValueError):
    """A task, a model or an option of it that does not exist or does not fit."""


class DataError(TaskError):
    """A data set that is missing, incomplete or broken; the message names the file."""
