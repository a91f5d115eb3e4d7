"""Pascal VOC's colours of class labels."""

__all__ = ["voc_palette"]


def voc_palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Red, green and blue of each label, as VOC's development kit makes them (``VOClabelcolormap.m``).

    Bit 3i of the label goes to red, 3i + 1 to green and 3i + 2 to blue, each to bit 7 - i.
    """

    def channel(label: int, first_bit: int) -> int:
        return sum((label >> (3 * i + first_bit) & 1) << (7 - i) for i in range(3))

    return [(channel(label, 0), channel(label, 1), channel(label, 2)) for label in range(num_classes)]
