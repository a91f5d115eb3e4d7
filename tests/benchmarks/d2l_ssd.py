"""TinySSD's training step beside that of "Dive into Deep Learning", section 14.7, in turn on the same cores.

The book's functions come from its own package, of which one file is read and none is imported (it wants old versions of
much else). The loop around them is the chapter's ``train_ssd``: anchors made anew in each forward pass,
``multibox_target``, losses, SGD, and both error counts in every step. Both train the same network from the same weights
on the same images in memory. Each has a process of its own, since ours keeps the memory that a step frees, and malloc
is one for all of a process; while it takes its step it has the cores to itself.

    pip download --no-deps --no-binary :none: d2l==1.0.3 && unzip d2l-1.0.3-*.whl -d d2l
    python -m tests.benchmarks.d2l_ssd d2l/d2l/torch.py
"""

import argparse
import ast
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.data.pixels import RAW
from models.options import TaskOptions
from models.ssd.network import TinySSD
from models.ssd.task import SSDTask
from models.task import Batch
from workers.device import tune_cpu_process

_SIZES = [[0.2, 0.272], [0.37, 0.447], [0.54, 0.619], [0.71, 0.79], [0.88, 0.961]]
_RATIOS = [[1, 2, 0.5]] * 5
_FUNCTIONS = {
    "box_corner_to_center",
    "box_iou",
    "assign_anchor_to_bbox",
    "offset_boxes",
    "multibox_prior",
    "multibox_target",
}


def book_functions(path: Path) -> dict[str, Any]:
    """The functions of the book's package that its SSD needs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in _FUNCTIONS]
    space: dict[str, Any] = {"torch": torch, "d2l": None}
    exec(compile(tree, str(path), "exec"), space)
    # What the package calls torch's own functions.
    aliases = {name: getattr(torch, name) for name in ("concat", "exp", "log", "stack", "tensor")}
    space["d2l"] = argparse.Namespace(**aliases, **{name: space[name] for name in _FUNCTIONS})
    return space


class BookSSD(nn.Module):
    """The chapter's ``TinySSD``: the same layers as ours, in which each pass makes its anchors."""

    def __init__(self, net: TinySSD, prior: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net = net
        self._prior = prior

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        anchors, classes, boxes = [], [], []
        features = images
        for index in range(5):
            features = self.net.blocks[index](features) if index < 4 else F.adaptive_max_pool2d(features, (1, 1))
            anchors.append(self._prior(features, sizes=_SIZES[index], ratios=_RATIOS[index]))
            classes.append(self.net.class_heads[index](features))
            boxes.append(self.net.box_heads[index](features))
        flat = [torch.flatten(value.permute(0, 2, 3, 1), start_dim=1) for value in classes]
        class_preds = torch.cat(flat, dim=1).reshape(images.shape[0], -1, self.net.num_classes + 1)
        box_preds = torch.cat([torch.flatten(value.permute(0, 2, 3, 1), start_dim=1) for value in boxes], dim=1)
        return torch.cat(anchors, dim=1), class_preds, box_preds


def book_step(net: BookSSD, functions: dict[str, Any], images: Tensor, labels: Tensor) -> Callable[[], float]:
    """The body of the chapter's loop; gives the mean loss."""
    trainer = torch.optim.SGD(net.parameters(), lr=0.2, weight_decay=5e-4)
    class_loss, box_loss = nn.CrossEntropyLoss(reduction="none"), nn.L1Loss(reduction="none")

    def step() -> float:
        trainer.zero_grad()
        anchors, class_preds, box_preds = net(images)
        box_labels, box_masks, class_labels = functions["multibox_target"](anchors, labels)
        count, classes = class_preds.shape[0], class_preds.shape[2]
        wrong = class_loss(class_preds.reshape(-1, classes), class_labels.reshape(-1)).reshape(count, -1).mean(dim=1)
        loss = wrong + box_loss(box_preds * box_masks, box_labels * box_masks).mean(dim=1)
        loss.mean().backward()
        trainer.step()
        float((class_preds.argmax(dim=-1).type(class_labels.dtype) == class_labels).sum())
        float(torch.abs((box_labels - box_preds.detach()) * box_masks).sum())
        return float(loss.mean())

    return step


def our_step(task: SSDTask, net: TinySSD, batch: Batch, precision: torch.dtype | None) -> Callable[[], float]:
    """The step of the plain loop of ``workers.baseline``; gives the mean loss."""
    trainer = torch.optim.SGD(net.parameters(), lr=0.2, weight_decay=5e-4, fused=True)

    def step() -> float:
        with torch.autocast("cpu", dtype=precision or torch.bfloat16, enabled=precision is not None):
            loss = task.loss(net, batch)
        mean = loss.total / loss.weight.to(loss.total.dtype)
        mean.backward()
        trainer.step()
        trainer.zero_grad(set_to_none=True)
        return float(mean)

    return step


def _take_steps(name: str, book: Path, threads: int, owner: Connection) -> None:
    """A process's work: a step whenever it is asked for one, of which it tells seconds and loss."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    task = SSDTask(TaskOptions(recipe="d2l", classes=("disc",)))
    dataset = task.build_dataset("train")
    chosen = [sample for index in range(200) if len((sample := dataset[index]).target["labels"]) == 1][:32]
    batch = task.collate(chosen)
    assert task._pixels == RAW
    net = TinySSD(1)
    if name == "book":
        functions = book_functions(book)
        labels = torch.cat([batch.targets["labels"][..., None].float(), batch.targets["boxes"]], dim=2)
        step = book_step(BookSSD(net, functions["multibox_prior"]), functions, batch.images, labels)
    else:
        last = batch.to(torch.device("cpu"), channels_last=True)
        precision = torch.bfloat16 if name == "ours, bf16" else None
        step = our_step(task, net.to(memory_format=torch.channels_last), last, precision)
    loss, kept = step(), name == "book"
    while owner.recv():
        if not kept:  # as every backend does after its first step
            tune_cpu_process()
            kept = True
        begin = time.perf_counter()
        step()
        owner.send((time.perf_counter() - begin, loss))


def main() -> None:
    """Measure in turn, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", type=Path, help="torch.py of the package d2l")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    names = ["book", "ours, fp32"]
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        names.append("ours, bf16")
    context = multiprocessing.get_context("spawn")
    asked: dict[str, Connection] = {}
    for name in names:
        asked[name], other = context.Pipe()
        context.Process(target=_take_steps, args=(name, options.book, options.threads, other), daemon=True).start()
    times: dict[str, list[float]] = {name: [] for name in names}
    first: dict[str, float] = {}
    for number in range(options.steps + 1):
        for name, connection in asked.items():
            connection.send(True)
            seconds, first[name] = connection.recv()
            if number:  # the first one takes its memory anew
                times[name].append(seconds)
    for connection in asked.values():
        connection.send(False)
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["book"], seconds, strict=True))
        median = 1e3 * statistics.median(seconds)
        print(f"{name:12} {median:7.0f} ms a step of 32 images, {ratio:.2f}x; first loss {first[name]:.5f}")


if __name__ == "__main__":
    main()
