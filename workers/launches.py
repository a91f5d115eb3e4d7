"""How many kernels a forward pass launches: a GPU's queue takes only so many behind a closed gate."""

from contextlib import ExitStack
from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Launches"]

_MOST = 600
"""A stream takes about a thousand launches; then the thread that launches waits, and so do others of its process, of
which one is to open the gate. Some operations launch two or three kernels."""


class Launches:
    """Counts the operations of one forward pass: ``begin`` before it, ``end`` behind it."""

    def __init__(self) -> None:
        self._counting: ExitStack | None = None
        self._count = _Count()
        self._known = False

    @property
    def fit(self) -> bool:
        """Whether such a pass may wait in the queue whole; not before one was counted."""
        return self._known and self._count.operations <= _MOST

    def begin(self) -> None:
        """Count from here on, if nothing was counted before."""
        if not self._known:
            self._count.operations = 0
            self._counting = ExitStack()
            self._counting.enter_context(self._count)

    def end(self) -> None:
        """The pass is over."""
        if self._counting is not None:
            counting, self._counting, self._known = self._counting, None, True
            counting.close()


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += not (func.is_view or str(func).startswith("aten.empty"))
        return func(*args, **(kwargs or {}))
