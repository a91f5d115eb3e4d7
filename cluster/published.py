"""Slices of new versions in Ray's object store, batch by batch as they are written, for whoever waits for them."""

import asyncio
from collections.abc import Sequence

import ray

from cluster.ray_transport import WireBatch
from paramserver.checksums import crc32_of
from paramserver.partition import Slice
from paramserver.transport.versions import VersionsArena

__all__ = ["Published"]


class Published:
    """What one server has put into the store; everything here runs in its event loop.

    Args:
        versions: where its slices are read.
    """

    def __init__(self, versions: VersionsArena) -> None:
        self._versions = versions
        self._batches: dict[int, list[WireBatch]] = {}
        self._waiting: list[asyncio.Future[None]] = []

    def put(self, version: int, pieces: Sequence[Slice]) -> None:
        """Publish slices that are written, but for those that are published already; older versions are forgotten."""
        for old in [known for known in self._batches if known < version - 1]:
            del self._batches[old]
        batches = self._batches.setdefault(version, [])
        known = {index for batch in batches for index in batch.indices}
        new = [piece for piece in pieces if piece.index not in known]
        if new:
            vector = self._versions.vectors[version % 2]
            arrays = [vector[piece.start : piece.stop].numpy() for piece in new]
            checksums = tuple(crc32_of(array) for array in arrays)
            batches.append(WireBatch(tuple(piece.index for piece in new), [ray.put(arrays)], checksums))
        self.wake()

    def beyond(self, version: int, have: int) -> list[WireBatch]:
        """All batches of a version but the first ``have``."""
        return self._batches.get(version, [])[have:]

    def clear(self) -> None:
        """Forget everything: versions that were not committed will be written again."""
        self._batches.clear()

    async def changed(self) -> None:
        """Wait until something was published, or somebody calls ``wake``."""
        self._waiting.append(asyncio.get_running_loop().create_future())
        await self._waiting[-1]

    def wake(self) -> None:
        """Let all who wait look again."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
