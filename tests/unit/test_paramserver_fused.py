"""One pass over memory has the bits of torch's many."""

import itertools
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paramserver import fused, optimizer
from paramserver.config import OptimizerConfig
from paramserver.errors import NonFiniteGradient
from paramserver.fused import Work, load_pass
from paramserver.fused_adam import fused_adam
from paramserver.fused_sgd import fused_sgd
from paramserver.messages import MicrobatchStats
from paramserver.optimizer import BufferMean
from paramserver.reduction import Node, maximal_nodes, plan_additions
from tests.support.servers import Fleet, bits_equal

PASSES = {"fused_sgd": fused_sgd, "fused_adam": fused_adam}
needs_a_compiler = pytest.mark.skipif(fused_sgd() is None, reason="no C compiler")
needs_the_adam_of_torch = pytest.mark.skipif(fused_adam() is None, reason="no C compiler, or another square root")


@pytest.fixture
def fresh_passes() -> Iterator[None]:
    for load in PASSES.values():
        load.cache_clear()
    yield
    for load in PASSES.values():
        load.cache_clear()


def _train(length: int, runs: list[range], steps: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """Values and momentum after some steps to which each run pushes its maximal tree nodes."""
    random = torch.Generator().manual_seed(length)
    microbatches = runs[-1].stop
    fleet = Fleet(
        {"w": torch.randn(length, generator=random), "v": torch.randn(3, generator=random)},
        OptimizerConfig(**{"lr": 0.1, **options}),
        num_microbatches=microbatches,
        num_servers=2,
        slice_bytes=4096,
    )
    client = fleet.client()
    for step in range(steps):
        for run in runs:
            for node in maximal_nodes(run.start, run.stop, microbatches):
                vector = torch.randn(fleet.partition.length, generator=random)
                rows = tuple(MicrobatchStats(index, 0.0, 1.5, 1) for index in range(node.lo, node.hi))
                client.push(step, node, vector, rows, {})
        client.wait(step + 1)
    state = fleet.state()
    return {**state.values, **{f"{key}/{name}": v for key, held in state.optimizer.items() for name, v in held.items()}}


def _runs(cuts: list[int]) -> list[range]:
    edges = sorted({0, *cuts})
    return [range(lo, hi) for lo, hi in itertools.pairwise(edges)]


@needs_a_compiler
@given(
    length=st.integers(1, 3000),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    options=st.sampled_from(
        [
            {},
            {"weight_decay": 0.01},
            {"momentum": 0.9},
            {"momentum": 0.9, "weight_decay": 0.01},
            {"momentum": 0.9, "nesterov": True},
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "lr_factors": (("w", 3.0),)},
        ]
    ),
)
@settings(max_examples=60, deadline=None)
def test_any_tree_and_setting_gives_the_bits_of_torch(length: int, cuts: list[int], options: dict[str, Any]) -> None:
    _assert_the_bits_of_torch("fused_sgd", length, cuts, options)


def _assert_the_bits_of_torch(name: str, length: int, cuts: list[int], options: dict[str, Any]) -> None:
    in_one_pass = _train(length, _runs(cuts), 3, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, name, lambda: None)
        plain = _train(length, _runs(cuts), 3, options)
    assert bits_equal(in_one_pass, plain)


@needs_the_adam_of_torch
@given(
    length=st.integers(1, 3000),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    options=st.sampled_from(
        [
            {"name": "adam"},
            {"name": "adam", "weight_decay": 0.01, "betas": (0.8, 0.95), "eps": 1e-6},
            {"name": "adamw", "lr_factors": (("w", 3.0),)},
            {"name": "adamw", "weight_decay": 0.01},
            {"name": "adam", "betas": (0.5, 0.999)},
            {"name": "adam", "betas": (0.51, 0.5)},
            {"name": "adamw", "betas": (0.0, 0.9)},
        ]
    ),
)
@settings(max_examples=40, deadline=None)
def test_the_same_holds_for_adam(length: int, cuts: list[int], options: dict[str, Any]) -> None:
    _assert_the_bits_of_torch("fused_adam", length, cuts, options)


GRAIN = 1 << 14
"""Elements that a thread takes at a time; see fused_work.h."""


@needs_a_compiler
@given(
    lengths=st.lists(st.sampled_from([1, 64, GRAIN - 1, GRAIN, GRAIN + 1, 3 * GRAIN + 5]), min_size=1, max_size=4),
    threads=st.integers(1, 4),
)
@settings(max_examples=30, deadline=None)
def test_threads_that_share_the_work_do_all_of_it_once(lengths: list[int], threads: int) -> None:
    sgd = fused_sgd()
    assert sgd is not None
    random = torch.Generator().manual_seed(sum(lengths))
    values = [torch.randn(length, generator=random) for length in lengths]
    pushed = [torch.randn(length, generator=random) for length in lengths]
    plan = plan_additions(Node(0, 1), (Node(0, 1),))
    settings = {"divisor": 2.0, "lr": 0.5, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    made = [value.clone() for value in values]  # in place: what is done twice would be seen
    chunks = [
        sgd.chunk([gradient.data_ptr()], plan, (new, new), (None, None), **settings)
        for new, gradient in zip(made, pushed, strict=True)
    ]
    work = Work(sgd.function, chunks)
    others = [threading.Thread(target=work) for _ in range(threads - 1)]
    for other in others:
        other.start()
    work()
    for other in others:
        other.join()
    assert work.finite
    for new, value, gradient in zip(made, values, pushed, strict=True):
        assert torch.equal(new, torch.add(value, gradient / 2.0, alpha=-0.5))


@needs_a_compiler
def test_buffers_in_one_pass_have_the_bits_of_torch() -> None:
    numbers = [0.0, -0.0, 1.0, -1.0, 1e-42, 3e38, -3e38, torch.inf, -torch.inf, torch.nan, 0.1, 1 / 3]
    old, total = (torch.tensor(pair) for pair in zip(*itertools.product(numbers, numbers), strict=True))
    divisor = torch.tensor(3.0)
    plain, one_pass = torch.zeros_like(old), torch.zeros_like(old)
    BufferMean((old, plain)).step_sum(0, total, divisor, torch.empty_like(old))
    buffers = BufferMean((old, one_pass))
    assert buffers.one_pass is not None
    for _ in range(2):  # the second time what was made for the first is used again
        one_pass.zero_()
        chunk = buffers.in_one_pass(0, (total.data_ptr(),), (), float(divisor), 0.1)
        Work(buffers.one_pass, [chunk])()
        assert torch.equal(one_pass.isnan(), plain.isnan())
        assert torch.equal(one_pass[~plain.isnan()].view(torch.int32), plain[~plain.isnan()].view(torch.int32))


@needs_a_compiler
@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, 63, 64, 999])
def test_a_gradient_that_is_not_finite_is_named_wherever_it_is(name: Any, value: float, place: int) -> None:
    fleet = Fleet({"w": torch.ones(1000)}, OptimizerConfig(name=name, lr=0.1), slice_bytes=4096)
    gradient = torch.zeros(1000)
    gradient[place] = value
    with pytest.raises(NonFiniteGradient, match="'w' is not finite in step 1"):
        fleet.step({"w": gradient})
    assert torch.equal(fleet.state().values["w"], torch.ones(1000)), "the committed version stands"


@needs_a_compiler
def test_large_finite_numbers_are_no_reason_to_stop() -> None:
    fleet = Fleet({"w": torch.zeros(100)}, OptimizerConfig(lr=1e-30), num_microbatches=1)
    fleet.step({"w": torch.full((100,), 3e38)})
    assert fleet.state().values["w"].isfinite().all()


@needs_a_compiler
def test_numbers_near_zero_are_kept() -> None:
    """No flags of the compiler or the processor make zeros of them."""
    fleet = Fleet({"w": torch.zeros(100)}, OptimizerConfig(lr=1.0))
    fleet.step({"w": torch.full((100,), 1e-42)})
    assert torch.equal(fleet.state().values["w"], torch.full((100,), -1e-42))


@pytest.mark.usefixtures("fresh_passes")
def test_without_a_compiler_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.shutil, "which", lambda _: None)
    assert fused_sgd() is None
    assert fused_adam() is None
    fleet = Fleet({"w": torch.zeros(4)}, OptimizerConfig(lr=1.0))
    fleet.step({"w": torch.ones(4)})
    assert torch.equal(fleet.state().values["w"], -torch.ones(4))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("fused_sgd", "kept + gradient;", "kept + gradient + 1e-7f;"),
        ("fused_sgd", "fmaf(direction", "fmaf(2 * direction"),
        ("fused_adam", "fmaf(weighed, gradient, kept)", "weighed * gradient + kept"),
    ],
)
@needs_the_adam_of_torch
@pytest.mark.usefixtures("fresh_passes")
def test_a_pass_with_other_bits_is_not_used(
    name: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (fused._FOLDER / f"{name}.c").read_text()
    assert old in text
    (tmp_path / f"{name}.c").write_text(text.replace(old, new))
    monkeypatch.setattr(f"paramserver.{name}.load_pass", partial(load_pass, folder=tmp_path))
    monkeypatch.setattr(fused.Path, "home", lambda: tmp_path)
    assert PASSES[name]() is None
    assert [path.suffix for path in (tmp_path / ".cache/pushpull").iterdir()] == [".so"], "nothing else is left"


@needs_a_compiler
@pytest.mark.usefixtures("fresh_passes")
def test_a_home_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".cache").write_text("a file")
    monkeypatch.setattr(fused.Path, "home", lambda: tmp_path)
    assert fused_sgd() is not None, "it is made in a folder that lasts as long as it takes"


@needs_a_compiler
@pytest.mark.usefixtures("fresh_passes")
def test_what_nobody_uses_any_more_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.Path, "home", lambda: tmp_path)
    cache = tmp_path / ".cache/pushpull"
    (cache / "tmp-of-a-killed-compiler").mkdir(parents=True)
    for name in ("fused_sgd-old.so", "fused_sgd-of-last-week.so"):
        (cache / name).touch()
    for name in ("tmp-of-a-killed-compiler", "fused_sgd-old.so"):
        os.utime(cache / name, (0, 0))
    assert fused_sgd() is not None
    assert len(list(cache.iterdir())) == 2, "one made now, and one of last week"
    assert (cache / "fused_sgd-of-last-week.so").exists()
