"""A trace of some steps: operations of the host and kernels of the device, for Perfetto or chrome://tracing."""

from pathlib import Path

import torch

from paramserver.errors import PushPullError
from workers.config import ProfileConfig
from workers.device import quiet_profiler

__all__ = ["StepProfiler", "stage_in_trace"]

stage_in_trace = torch.profiler.record_function
"""Makes a context that stands in a trace by its name."""


class StepProfiler:
    """Records a worker's steps by ``torch.profiler``, its stages among the operations. Such steps are slower.

    Args:
        config: which steps, and where the trace goes.
        worker: what the worker is called in records, and so its trace.
        device: on which it computes.
    """

    def __init__(self, config: ProfileConfig, worker: int, device: torch.device) -> None:
        self._config = config
        self._path = Path(config.folder) / f"worker-{worker}.json.gz"
        self._activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(torch.profiler.ProfilerActivity.CUDA)

    def begin(self, step: int) -> None:
        """Step ``step``, from 1, comes next."""
        if self._recording() is not None or not self._config.first <= step <= self._config.last:
            return
        for interrupted in [*_of_this_process]:  # it could not wait for its device then
            interrupted.give_up()
        quiet_profiler()
        recording = _of_this_process[self] = torch.profiler.profile(activities=self._activities)
        recording.start()

    def end(self, step: int, *, stop: bool) -> None:
        """Step ``step`` is committed. After the last one, or if none follows, the trace is written.

        Raises:
            PushPullError: if it cannot be.
        """
        recording = self._recording()
        if recording is None or not (stop or step >= self._config.last):
            return
        self.give_up()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            recording.export_chrome_trace(str(self._path))
        except OSError as error:
            raise PushPullError(f"{self._path} cannot be written ({error.strerror}): is the disk full?") from error

    def give_up(self) -> None:
        """Record no more and write nothing; waits for the device."""
        recording = _of_this_process.pop(self, None)
        if recording is not None:
            recording.stop()

    def _recording(self) -> torch.profiler.profile | None:
        return _of_this_process.get(self)


_of_this_process: dict[StepProfiler, torch.profiler.profile] = {}
"""The recording under way: a process has one at most."""
