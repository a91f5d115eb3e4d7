"""Words for which a GPU's stream can wait: the host queues work first, and lets it begin later."""

import ctypes
from functools import lru_cache

import torch

__all__ = ["Gates"]

_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ, as cuda.h has it
_OPEN = 2**31 - 1


class Gates:
    """Each opens for a number and all below it, and begins at 0.

    Source: ``cuStreamWaitValue32`` of CUDA's driver, on page-locked memory, whose address is the same on both sides.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self._words = torch.zeros(count, dtype=torch.int32, pin_memory=True)
        self._view = self._words.numpy()

    @staticmethod
    @lru_cache(maxsize=1)
    def exist() -> bool:
        """Whether the driver has them."""
        if not torch.cuda.is_available():
            return False
        try:
            gates = Gates(1)
            gates.open(0, 1)
            gates.wait(torch.cuda.current_stream(), 0, 1)
            torch.cuda.current_stream().synchronize()  # the word is somebody else's when this returns
        except (OSError, AttributeError, RuntimeError):
            return False
        return True

    def wait(self, stream: torch.cuda.Stream, gate: int, number: int) -> None:
        """What is queued on ``stream`` after this begins once ``gate`` was opened for ``number``.

        Raises:
            RuntimeError: if the driver refuses.
        """
        address = self._words.data_ptr() + gate * self._words.element_size()
        status = _driver().cuStreamWaitValue32_v2(stream.cuda_stream, address, number, _AT_LEAST)
        if status:
            raise RuntimeError(f"CUDA driver error {status}: a stream cannot wait for a word of host memory")

    def open(self, gate: int, number: int) -> None:
        """Let begin what waits for ``number`` or less; what this thread has written before is seen by it."""
        self._view[gate] = number

    def open_all(self) -> None:
        """For every number."""
        self._view[:] = _OPEN


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuStreamWaitValue32_v2.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    return driver
