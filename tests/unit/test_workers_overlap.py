"""Which slices go out while backward is under way."""

import random

import pytest

from paramserver.config import ServerConfig
from paramserver.partition import BUFFERS, KeySpec, Partition, Slice, make_partition
from workers.overlap import ReadySlices

KEYS = {"a": 500, "b": 3, "c": 64, "d": 1000, "e": 10}


def _partition() -> Partition:
    specs = [KeySpec(name, (size,), (1,), index % 2) for index, (name, size) in enumerate(KEYS.items())]
    return make_partition([*specs, KeySpec("mean", (70,), (1,), BUFFERS)], ServerConfig(slice_bytes=512, num_servers=2))


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_slice_goes_out_once_and_not_before_all_its_keys(seed: int, copies: bool) -> None:
    partition, names = _partition(), list(KEYS)
    done: set[str] = set()
    sent: list[list[Slice]] = []

    def send(slices: list[Slice]) -> None:
        for piece in slices:
            held = {key.name for key, _, _ in partition.pieces[piece.index]}
            assert piece.group == BUFFERS or held <= done
        sent.append(list(slices))

    ready = ReadySlices(partition, names, send, least_elements=1, copies=copies)  # type: ignore[arg-type]
    for _ in range(2):
        done.clear()
        sent.clear()
        ready.begin()
        for index in random.Random(seed).sample(range(len(names)), len(names)):
            done.add(names[index])
            ready.done(index)
        ready.end()
        everything = [piece.index for group in sent for piece in group]
        assert sorted(everything) == list(range(len(partition.slices)))
        assert len(sent) <= (7 if copies else 4), "a few messages"
        assert not ready.active


def test_a_message_goes_out_even_if_it_is_empty_but_no_second_one() -> None:
    sent: list[int] = []
    ready = ReadySlices(_partition(), list(KEYS), lambda slices: sent.append(len(slices)))
    ready.end()
    assert sent == [], "nothing was begun"
    ready.begin()
    ready.end()
    assert len(sent) == 1
    sent.clear()
    ready = ReadySlices(_partition(), list(KEYS), lambda slices: sent.append(len(slices)), least_elements=1)
    ready.begin()
    for index in range(len(KEYS)):
        ready.done(index)
    ready.end()
    assert 0 not in sent
