"""Keys on 256-byte boundaries, slices that tile each group, placement balanced by bytes (E2)."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paramserver.config import ServerConfig
from paramserver.errors import ConfigError
from paramserver.partition import BUFFERS, KeySpec, Partition, make_partition


def spec(name: str, *shape: int, group: int = 0, channels_last: bool = False) -> KeySpec:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    value = torch.empty(shape).contiguous(memory_format=layout)
    return KeySpec(name, tuple(value.shape), tuple(value.stride()), group)


@st.composite
def models(draw: st.DrawFn) -> list[KeySpec]:
    """Keys of up to four dimensions, scalars and channels-last ones among them, in several groups."""
    specs = []
    for index in range(draw(st.integers(1, 12))):
        shape = draw(st.lists(st.integers(1, 9), max_size=4))
        group = draw(st.sampled_from([0, 0, 1, 2, BUFFERS]))
        channels_last = len(shape) == 4 and draw(st.booleans())
        specs.append(spec(f"key{index}", *shape, group=group, channels_last=channels_last))
    return specs


configs = st.builds(
    ServerConfig, num_servers=st.integers(1, 5), slice_bytes=st.sampled_from([256, 512, 1024, 768, 1 << 20])
)


@settings(deadline=None, max_examples=50)
@given(models(), configs)
def test_keys_are_aligned_and_slices_tile_the_groups_exactly(specs: list[KeySpec], config: ServerConfig) -> None:
    partition = make_partition(specs, config)
    assert sorted(key.name for key in partition.keys) == sorted(key.name for key in specs)
    end = 0
    for key in partition.keys:
        assert key.offset * 4 % 256 == 0
        assert end <= key.offset < end + 64, "keys overlap, or there is more between them than alignment needs"
        end = key.offset + key.numel
    assert 0 <= partition.length - end < 64

    assert [piece.index for piece in partition.slices] == list(range(len(partition.slices)))
    end = 0
    for piece in partition.slices:
        assert piece.start == end
        assert piece.numel % 64 == 0
        assert 0 < piece.numel * 4 <= config.slice_bytes
        end = piece.stop
    assert end == partition.length

    group_of = {key.name: key.group for key in partition.keys}
    covered: dict[str, int] = dict.fromkeys(group_of, 0)
    for piece, held in zip(partition.slices, partition.pieces, strict=True):
        assert held, "a slice without a key"
        for key, start, stop in held:
            assert 0 <= start < stop <= piece.numel
            assert group_of[key.name] == piece.group
            covered[key.name] += stop - start
    assert covered == {key.name: key.numel for key in partition.keys}


@settings(deadline=None, max_examples=50)
@given(models(), configs)
def test_groups_follow_each_other_with_buffers_last(specs: list[KeySpec], config: ServerConfig) -> None:
    groups = [piece.group for piece in make_partition(specs, config).slices]
    assert groups == sorted(groups, key=lambda group: (group == BUFFERS, group))


@settings(deadline=None, max_examples=50)
@given(models(), configs)
def test_slices_do_not_depend_on_the_number_of_servers(specs: list[KeySpec], config: ServerConfig) -> None:
    one = make_partition(specs, replace(config, num_servers=1))
    many = make_partition(specs, config)
    assert many.keys == one.keys
    assert [replace(piece, server=0) for piece in many.slices] == list(one.slices)


@settings(deadline=None, max_examples=50)
@given(models(), configs)
def test_bytes_are_balanced_to_within_one_slice(specs: list[KeySpec], config: ServerConfig) -> None:
    partition = make_partition(specs, config)
    loads = partition.bytes_by_server()
    assert len(loads) == config.num_servers
    assert sum(loads) == partition.length * 4
    assert max(loads) - min(loads) <= max(piece.numel for piece in partition.slices) * 4
    for server, pieces in enumerate(partition.by_server):
        assert all(piece.server == server for piece in pieces)
        assert [piece.index for piece in pieces] == sorted(piece.index for piece in pieces)


@settings(deadline=None, max_examples=50)
@given(models(), configs, st.integers(0, 1 << 32))
def test_flatten_and_unflatten_are_inverse_and_keep_strides(
    specs: list[KeySpec], config: ServerConfig, seed: int
) -> None:
    partition = make_partition(specs, config)
    generator = torch.Generator().manual_seed(seed)
    values = {key.name: torch.randn(key.shape, generator=generator) for key in partition.keys}
    flat = partition.flatten(values)
    assert flat.shape == (partition.length,)
    views = partition.unflatten(flat)
    for key in partition.keys:
        assert torch.equal(views[key.name], values[key.name])
        assert views[key.name].stride() == key.stride
        views[key.name].zero_()
    assert not flat.any(), "padding is not zero, or a view does not write through"


@settings(deadline=None, max_examples=30)
@given(models(), configs)
def test_a_view_of_a_part_of_a_longer_vector_lies_at_the_right_place(
    specs: list[KeySpec], config: ServerConfig
) -> None:
    partition = make_partition(specs, config)
    flat = torch.zeros(64 + partition.length)[64:]
    for value, view in enumerate(partition.unflatten(flat).values(), start=1):
        view.fill_(value)
    for value, key in enumerate(partition.keys, start=1):
        assert (flat[key.offset : key.offset + key.numel] == value).all()


def test_a_channels_last_key_lies_in_memory_as_the_convolution_wants_it() -> None:
    partition = make_partition([spec("conv", 8, 3, 5, 5, channels_last=True)], ServerConfig())
    weight = torch.randn(8, 3, 5, 5)
    flat = partition.flatten({"conv": weight})
    assert partition.unflatten(flat)["conv"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(flat[:600], weight.permute(0, 2, 3, 1).reshape(-1))


def test_a_known_layout() -> None:
    specs = [spec("a", 100), spec("bn", 3, group=BUFFERS), spec("b"), spec("c", 65, group=1)]
    partition = make_partition(specs, ServerConfig(num_servers=2, slice_bytes=512))
    assert [(key.name, key.offset) for key in partition.keys] == [("a", 0), ("b", 128), ("c", 192), ("bn", 320)]
    assert [(s.group, s.start, s.stop, s.server) for s in partition.slices] == [
        (0, 0, 128, 0),
        (0, 128, 192, 0),
        (1, 192, 320, 1),
        (BUFFERS, 320, 384, 1),
    ]
    assert partition.bytes_by_server() == [768, 768]


def _hashes() -> dict[str, Partition]:
    base = [spec("a", 4, 6, 2, 2), spec("b", 24)]
    config = ServerConfig(num_servers=2, slice_bytes=256)
    return {
        "base": make_partition(base, config),
        "order": make_partition(base[::-1], config),
        "name": make_partition([base[0], spec("c", 24)], config),
        "shape": make_partition([base[0], spec("b", 12, 2)], config),
        "stride": make_partition([spec("a", 4, 6, 2, 2, channels_last=True), base[1]], config),
        "group": make_partition([base[0], spec("b", 24, group=1)], config),
        "buffer": make_partition([base[0], spec("b", 24, group=BUFFERS)], config),
        "slice size": make_partition(base, replace(config, slice_bytes=512)),
        "servers": make_partition(base, replace(config, num_servers=1)),
    }


def test_the_hash_changes_with_everything_that_participants_must_share() -> None:
    partitions = _hashes()
    assert len({partition.hash for partition in partitions.values()}) == len(partitions)
    assert _hashes()["base"].hash == partitions["base"].hash


def test_more_servers_than_slices_leaves_some_with_nothing() -> None:
    partition = make_partition([spec("a", 10)], ServerConfig(num_servers=3))
    assert [len(pieces) for pieces in partition.by_server] == [1, 0, 0]


def test_slices_of_the_same_size_are_dealt_in_turn() -> None:
    partition = make_partition([spec("a", 64 * 7)], ServerConfig(num_servers=3, slice_bytes=256))
    assert [piece.server for piece in partition.slices] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    "arguments", [{"num_servers": 0}, {"slice_bytes": 0}, {"slice_bytes": 128}, {"slice_bytes": 300}]
)
def test_settings_that_cannot_work_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"servers is 0|multiple of 256"):
        ServerConfig(**arguments)


def test_it_survives_pickling_with_its_hash() -> None:
    import pickle

    partition = make_partition([spec("a", 100), spec("b", 3, group=BUFFERS)], ServerConfig(slice_bytes=256))
    again = pickle.loads(pickle.dumps(partition))
    assert (again, again.hash) == (partition, partition.hash)
    values: dict[str, Tensor] = {"a": torch.randn(100), "b": torch.randn(3)}
    assert torch.equal(again.flatten(values), partition.flatten(values))
