"""Numbers of annotations."""

import math

__all__ = ["finite"]


def finite(value: str | float) -> float:
    """The number; what is not finite would pass every comparison with an image's size.

    Raises:
        TypeError, ValueError: if it is none.
    """
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is not a finite number")
    return number
