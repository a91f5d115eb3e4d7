"""What a device waits for behind its backward: the last bucket's way through a server of its machine, and what is late.

A stand-in without a GPU: backward is a pause, in which buckets arrive as its work is spread over the network. They are
those that a GPU sends (``ReadySlices`` with ``copies``), and a thread has each one's message ready when it comes. Timed
is from the end of the pause until all slices stand at the next version, as the thread sees it that would bring them up.
Steps that are foretold and steps that go through the interpreter come in turn, each with a server process of its own.

    python -m tests.benchmarks.last_bucket --model fcn_resnet50 --backward-ms 200
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection

import torch
import torchvision
from torch import nn

from paramserver.client import Client
from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.messages import MicrobatchStats
from paramserver.partition import Slice
from paramserver.reduction import Node
from paramserver.server import Server
from paramserver.server_memory import ServerMemory
from paramserver.transport.hub import Hub
from paramserver.transport.shared_memory import SharedMemoryTransport
from paramserver.transport.versions import VersionsArena
from workers.overlap import ReadySlices
from workers.replica import describe_model

_OPTIMIZER = OptimizerConfig(lr=0.01, momentum=0.9, weight_decay=1e-4)
_TIMEOUT_S = 30.0
_WARM_UP = 4
_MODELS = {
    "fcn_resnet50": lambda: torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=21, aux_loss=True
    ),
    "resnet50": lambda: torchvision.models.resnet50(weights=None),
}


def _serve(model: str, threads: int, foretell: bool, owner: Connection) -> None:
    torch.set_num_threads(1)
    partition, state = describe_model(_MODELS[model](), _OPTIMIZER, ServerConfig())
    versions = VersionsArena.create(partition)
    memory = ServerMemory(partition, 0, _OPTIMIZER, 1, state, versions.vectors)
    server = Server(0, partition, _OPTIMIZER, 1, state, memory=memory)
    hub = Hub(server, versions, threads=threads, foretell=foretell)
    owner.send(hub.address)
    owner.recv()
    hub.close()


def _work(name: str, parameter: nn.Parameter) -> float:
    """Of a key's backward, in elements: the first layers have more pixels, and each kernel costs something."""
    pixels = 16 if name.startswith(("backbone.conv1", "conv1")) else 4 if "layer1" in name else 1
    return pixels * (parameter.numel() + (20_000 if parameter.ndim == 4 else 2_000))


class Worker:
    """One worker and its server.

    Args:
        name: of the model.
        threads: of the server.
        foretell: see ``Hub``.
    """

    def __init__(self, name: str, threads: int, *, foretell: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, threads, foretell, other), daemon=True)
        self._process.start()
        model = _MODELS[name]()
        self.partition, _ = describe_model(model, _OPTIMIZER, ServerConfig())
        named = list(reversed(list(model.named_parameters())))
        self._keys = [key for key, _ in named]
        work = [_work(key, parameter) for key, parameter in named]
        self._spent = [sum(work[: index + 1]) / sum(work) for index in range(len(work))]
        self._integers = {key: value for key, value in model.named_buffers() if not value.is_floating_point()}
        transport = SharedMemoryTransport({0: self._connection.recv()}, self.partition)
        self._client = Client(0, self.partition, transport, _TIMEOUT_S)
        self._flat = self._client.allocate()
        self._flat.copy_(1e-3 * torch.randn(self._flat.shape))
        self._sender, self._bringer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.buckets: list[Sequence[Slice]] = []

    def step(self, backward_s: float) -> float:
        """Milliseconds from the end of backward until all slices have come."""
        version = self._client.version = self._client.version + 1
        sent: list[Future[None]] = []
        known, self.buckets = self.buckets, []

        def send(slices: Sequence[Slice]) -> None:
            self.buckets.append(list(slices))
            sent.append(self._sender.submit(send_later, self.buckets[-1], arrives))

        def send_later(bucket: Sequence[Slice], at: float) -> None:
            about = (Node(0, 1), self._flat, (MicrobatchStats(0, 1.5, 16.0, 16),), self._integers, bucket)
            push = self._client.prepare(version - 1, *about)
            time.sleep(max(0.0, at - time.perf_counter()))
            push()

        def bring(buckets: Sequence[Sequence[Slice]]) -> float:
            for bucket in buckets:
                self._client.await_slices(version, bucket)
            return time.perf_counter()

        ready = ReadySlices(self.partition, self._keys, send, copies=True)
        begin = arrives = time.perf_counter()
        ready.begin()
        for index, spent in enumerate(self._spent):
            arrives = begin + backward_s * spent
            ready.done(index)
        ready.end()
        came = self._bringer.submit(bring, known or self.buckets).result()
        for future in sent:
            future.result()
        self._client.wait(version)
        return 1e3 * (came - begin - backward_s)

    def close(self) -> None:
        """End the server."""
        self._client.close()
        self._connection.send(None)
        self._process.join()


def main() -> None:
    """Print what is exposed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=_MODELS, default="fcn_resnet50")
    parser.add_argument("--threads", type=int, default=2, help="of each server")
    parser.add_argument("--backward-ms", type=float, default=200.0)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    workers = {
        "foretold": Worker(options.model, options.threads, foretell=True),
        "by the interpreter": Worker(options.model, options.threads, foretell=False),
    }
    found: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(options.steps + _WARM_UP):
        for name, worker in workers.items():
            found[name].append(worker.step(1e-3 * options.backward_ms))
    buckets = workers["foretold"].buckets
    megabytes = ", ".join(f"{4e-6 * sum(piece.numel for piece in bucket):.1f}" for bucket in buckets)
    print(f"{options.model}: buckets of {megabytes} MB; ms behind a backward of {options.backward_ms:.0f} ms:")
    for name, values in found.items():
        kept = values[_WARM_UP:]
        print(f"{name:20}{statistics.median(kept):6.2f} ({min(kept):.2f} to {max(kept):.2f})")
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()
