"""Names that an option may have."""

from collections.abc import Iterable

from models.errors import TaskError

__all__ = ["check_choice"]


def check_choice(complaint: str, value: str, known: Iterable[str]) -> None:
    """See that ``value`` is among the names that are known.

    Raises:
        TaskError: ``complaint``, the value, and the names to use.
    """
    names = list(known)
    if value not in names:
        raise TaskError(f"{complaint} {value!r}: use one of {', '.join(names)}")
