"""What all data sets have in common that are made on the fly."""

import numpy as np
from torch.utils.data import Dataset

from models.task import Sample, Split

__all__ = ["Synthetic"]

_SPLITS: tuple[Split, ...] = ("train", "val")


class Synthetic(Dataset[Sample]):
    """So many samples, each of which depends on nothing but the seed, the split and its index.

    Args:
        split: train or val; their samples differ.
        length: number of samples.
        seed: of the whole data set.
    """

    def __init__(self, split: Split, length: int, seed: int) -> None:
        self._key = (seed % 2**64, _SPLITS.index(split))
        self._length = length

    def __len__(self) -> int:
        return self._length

    def _generator(self, index: int) -> np.random.Generator:
        """That of one sample.

        Raises:
            IndexError: if there is no such sample.
        """
        if not 0 <= index < self._length:
            raise IndexError(index)
        return np.random.default_rng([*self._key, index])
