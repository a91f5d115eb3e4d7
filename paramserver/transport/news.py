"""What has been written of a version since somebody was told last."""

from collections.abc import Sequence

from paramserver.partition import Slice
from paramserver.transport.versions import VersionsArena

__all__ = ["News"]


class News:
    """Slices that have been written and not been told of, once there are enough of them.

    Args:
        pieces: all there are.
        versions: where they stand.
        least_elements: how many are enough.
    """

    def __init__(self, pieces: Sequence[Slice], versions: VersionsArena, least_elements: int) -> None:
        self._pieces = pieces
        self._versions = versions
        self._least_elements = least_elements
        self._told: set[int] = set()

    def take(self, version: int, least_elements: int | None = None) -> list[Slice]:
        """New slices at ``version``, none if they are too few, or the last: the commit follows at once.

        Args:
            version: which.
            least_elements: how many are enough this time; None: as always.
        """
        enough = self._least_elements if least_elements is None else least_elements
        new = [piece for piece in self._pieces if piece.index not in self._told and self._versions.has(piece, version)]
        if sum(piece.numel for piece in new) < enough or len(self._told) + len(new) == len(self._pieces):
            return []
        self._told.update(piece.index for piece in new)
        return new

    def forget(self) -> None:
        """Another version is written from now on."""
        self._told.clear()
