"""A model in one flat vector: views, not copies, in the model's own memory format."""

import pytest
import torch
from torch import Tensor, nn

from paramserver.config import OptimizerConfig, ServerConfig
from paramserver.errors import ConfigError, ReplicaMismatch
from paramserver.fingerprint import fingerprint
from paramserver.partition import BUFFERS
from tests.support.tiny_task import TinyNet
from workers.replica import Replica, describe_model


def _replica(
    *, channels_last: bool = False, optimizer: OptimizerConfig | None = None, model: nn.Module | None = None
) -> Replica:
    torch.manual_seed(0)
    model = model or TinyNet()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    partition, _ = describe_model(model, optimizer or OptimizerConfig(), ServerConfig(slice_bytes=512))
    return Replica(model, partition)


def _loss(model: nn.Module) -> Tensor:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return model(images).square().sum()


@pytest.mark.parametrize("channels_last", [False, True])
def test_parameters_are_views_with_their_strides(channels_last: bool) -> None:
    plain = TinyNet().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    replica = _replica(channels_last=channels_last)
    for name, parameter in replica.model.named_parameters():
        assert parameter.untyped_storage().data_ptr() == replica.values.untyped_storage().data_ptr(), name
        assert parameter.data_ptr() % 4 == 0
        assert (parameter.data_ptr() - replica.values.data_ptr()) % 256 == 0, name
        assert parameter.stride() == plain.get_parameter(name).stride(), name
    assert replica.model.get_parameter("body.weight").is_contiguous(memory_format=torch.channels_last) == channels_last
    replica.values.fill_(0.5)
    assert all((parameter == 0.5).all() for parameter in replica.model.parameters())


@pytest.mark.parametrize("channels_last", [False, True])
def test_carving_changes_no_bit(channels_last: bool) -> None:
    torch.manual_seed(0)
    wanted = TinyNet().state_dict()
    replica = _replica(channels_last=channels_last)
    assert fingerprint(replica.model.state_dict()) == fingerprint(wanted)


@pytest.mark.parametrize("channels_last", [False, True])
def test_point_to_takes_another_vector_without_copying(channels_last: bool) -> None:
    replica = _replica(channels_last=channels_last)
    before = replica.values
    bits = before.clone()
    other = torch.zeros(replica.partition.length)
    for key in replica.partition.keys:
        key.view(other).copy_(torch.arange(key.numel).reshape(key.shape))
    wanted = other.clone()
    replica.point_to(other)
    assert torch.equal(before, bits)
    assert torch.equal(other, wanted)
    for key in replica.partition.keys:
        if key.group != BUFFERS:
            parameter = replica.model.get_parameter(key.name)
            assert torch.equal(parameter.detach(), torch.arange(key.numel).float().reshape(key.shape))
            assert parameter.data_ptr() == other.data_ptr() + 4 * key.offset
            assert parameter.requires_grad
            assert parameter.is_leaf
    _loss(replica.model).backward()
    assert replica.model.get_parameter("stem.weight").grad is not None


def test_a_parameter_that_points_ahead_once_its_gradient_is_made_is_read_no_more() -> None:
    plain, ahead = _replica(), _replica()
    torch.manual_seed(1)  # dropout
    _loss(plain.model).backward()
    spoilt = torch.full((ahead.partition.length,), torch.nan)
    for index, (_, parameter) in enumerate(ahead.parameters):
        parameter.register_post_accumulate_grad_hook(lambda _, index=index: ahead.point_ahead(index, spoilt))
    torch.manual_seed(1)
    _loss(ahead.model).backward()
    for (key, wanted), (_, parameter) in zip(plain.parameters, ahead.parameters, strict=True):
        assert torch.equal(parameter.grad, wanted.grad), key.name
        assert parameter.data_ptr() == spoilt.data_ptr() + 4 * key.offset
    ahead.point_to(spoilt)
    assert ahead.values is spoilt


@pytest.mark.parametrize("given_up", [False, True])
def test_all_parameters_point_to_one_vector_whichever_went_ahead(given_up: bool) -> None:
    replica = _replica()
    first, other = replica.values, replica.values.clone()
    replica.point_ahead(0, other)
    wanted = first if given_up else other
    replica.point_to(wanted)
    assert replica.values is wanted
    for key, parameter in replica.parameters:
        assert parameter.data_ptr() == wanted.data_ptr() + 4 * key.offset


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_are_taken_out_and_dropped(channels_last: bool) -> None:
    replica = _replica(channels_last=channels_last)
    replica.model.eval()
    _loss(replica.model).backward()
    wanted = {name: parameter.grad.clone() for name, parameter in replica.model.named_parameters()}
    out = torch.full((replica.partition.length,), 7.0)
    replica.take_gradients(out)
    views = replica.partition.unflatten(out)
    for name, gradient in wanted.items():
        assert torch.equal(views[name], gradient), name
    assert all(parameter.grad is None for parameter in replica.model.parameters())
    assert (views["norm.running_mean"] == 7.0).all(), "buffers are not its business"


def test_a_parameter_that_got_no_gradient_counts_as_zero() -> None:
    replica = _replica()
    replica.model.head(torch.ones(1, 6)).sum().backward()
    out = torch.full((replica.partition.length,), 7.0)
    replica.take_gradients(out)
    views = replica.partition.unflatten(out)
    assert not views["stem.weight"].any()
    assert torch.equal(views["head.bias"], torch.ones(3))


def test_keys_are_laid_out_in_reverse_order_with_buffers_last() -> None:
    replica = _replica()
    keys = replica.partition.keys
    trained = [key.name for key in keys if key.group != BUFFERS]
    assert trained == [name for name, _ in replica.model.named_parameters()][::-1]
    assert [key.name for key in keys[len(trained) :]] == ["norm.running_mean", "norm.running_var"]
    part = replica.buffer_part(replica.values)
    assert part.data_ptr() == replica.values.data_ptr() + 4 * keys[len(trained)].offset


def test_keys_of_one_factor_lie_together() -> None:
    replica = _replica(optimizer=OptimizerConfig(lr_factors=(("head.*", 10.0), ("*.bias", 2.0))))
    groups = {key.name: key.group for key in replica.partition.keys}
    assert groups["head.bias"] == groups["head.weight"] != groups["stem.bias"] == groups["norm.bias"]
    assert len({groups[name] for name, _ in replica.model.named_parameters()}) == 3


# -- frozen keys -------------------------------------------------------------------------------------------------------


def test_frozen_keys_have_no_slice_but_are_constants_of_the_state() -> None:
    model = TinyNet()
    optimizer = OptimizerConfig(frozen=("stem.*",))
    partition, state = describe_model(model, optimizer, ServerConfig())
    assert not {"stem.weight", "stem.bias"} & {key.name for key in partition.keys}
    assert state.constants.keys() == {"stem.weight", "stem.bias"}
    assert state.integers.keys() == {"norm.num_batches_tracked"}
    assert state.state_dict().keys() == model.state_dict().keys()
    assert fingerprint(state.state_dict()) == fingerprint(model.state_dict())
    assert not model.stem.weight.requires_grad
    assert model.body.weight.requires_grad
    replica = Replica(model, partition)
    replica.load({}, {"stem.weight": torch.ones(8, 3, 3, 3), "stem.bias": torch.ones(8)})
    assert (model.stem.weight == 1).all()


def test_what_the_model_froze_itself_stays_frozen() -> None:
    model = TinyNet()
    model.scale.requires_grad_(False)
    partition, state = describe_model(model, OptimizerConfig(), ServerConfig())
    assert state.constants.keys() == {"scale"}
    assert "scale" not in {key.name for key in partition.keys}


def test_the_state_is_a_copy() -> None:
    model = TinyNet()
    _, state = describe_model(model, OptimizerConfig(), ServerConfig())
    wanted = fingerprint(state.state_dict())
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    assert fingerprint(state.state_dict()) == wanted


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["head.weight", "norm.running_mean"])
def test_other_dtypes_are_refused_by_name(name: str, dtype: torch.dtype) -> None:
    model = TinyNet()
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    value = getattr(module, attribute).detach().to(dtype)
    setattr(module, attribute, nn.Parameter(value) if attribute == "weight" else value)
    with pytest.raises(ConfigError, match=f"'{name}' is {dtype}: .* must be float32"):
        describe_model(model, OptimizerConfig(), ServerConfig())


def test_a_layout_that_is_not_dense_is_refused_by_name() -> None:
    model = TinyNet()
    model.head.weight = nn.Parameter(torch.randn(6, 3).t())
    with pytest.raises(ConfigError, match=r"'head\.weight' is neither contiguous nor channels-last"):
        describe_model(model, OptimizerConfig(), ServerConfig())


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (OptimizerConfig(frozen=("haed.*",)), "'haed"),
        (OptimizerConfig(lr_factors=(("haed.*", 2.0),)), "'haed"),
        (OptimizerConfig(frozen=("*",)), "every parameter is frozen"),
    ],
)
def test_patterns_that_cannot_work_are_refused(optimizer: OptimizerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        describe_model(TinyNet(), optimizer, ServerConfig())


# -- buffers -----------------------------------------------------------------------------------------------------------


def test_every_microbatch_starts_from_the_pulled_buffers() -> None:
    replica = _replica()
    pulled = {name: buffer.clone() for name, buffer in replica.model.named_buffers()}
    changes = []
    for _ in range(2):
        replica.reset_buffers()
        for name, buffer in replica.model.named_buffers():
            assert torch.equal(buffer, pulled[name]), name
        torch.manual_seed(3)
        _loss(replica.model)
        assert replica.integers()["norm.num_batches_tracked"] == 1
        out = torch.zeros(replica.partition.length)
        replica.take_buffer_changes(replica.buffer_part(out), 4)
        changes.append(out)
    after = dict(replica.model.named_buffers())
    view = replica.partition.unflatten(changes[0])["norm.running_mean"]
    assert torch.equal(view, 4 * (after["norm.running_mean"] - pulled["norm.running_mean"]))
    assert view.any()
    assert torch.equal(changes[0], changes[1])


def test_buffers_are_private_copies_of_the_version() -> None:
    replica = _replica()
    version = replica.values.clone()
    _loss(replica.model)
    assert torch.equal(replica.values, version)


def test_load_takes_integers_for_the_next_reset() -> None:
    replica = _replica()
    _loss(replica.model)
    mean = replica.partition.unflatten(replica.values)["norm.running_mean"]
    mean.fill_(0.25)
    replica.load({"norm.num_batches_tracked": torch.tensor(41)})
    replica.reset_buffers()
    assert replica.model.norm.num_batches_tracked == 41
    assert (replica.model.norm.running_mean == 0.25).all()
    _loss(replica.model)
    replica.reset_buffers()
    assert replica.model.norm.num_batches_tracked == 41


def test_integer_buffers_must_agree_with_those_of_another_microbatch() -> None:
    replica = _replica()
    name = "norm.num_batches_tracked"
    _loss(replica.model)
    first = replica.agreed_integers({})
    assert first[name] == 1
    assert replica.agreed_integers(first)[name] == 1
    with pytest.raises(ReplicaMismatch, match=r"'norm\.num_batches_tracked' differs .*2.*1"):
        replica.agreed_integers({name: torch.tensor(2)})


def test_evaluating_uses_the_pulled_buffers_and_leaves_no_trace() -> None:
    replica = _replica()
    _loss(replica.model)
    with replica.evaluating() as model:
        assert not model.training
        assert not torch.is_grad_enabled()
        assert model.norm.num_batches_tracked == 0
        one, other = _loss(model), _loss(model)
        assert torch.equal(one, other)
        assert not one.requires_grad
    assert replica.model.training
    assert torch.is_grad_enabled()


def test_a_buffer_that_is_not_saved_is_not_state() -> None:
    model = TinyNet()
    model.register_buffer("cache", torch.ones(3), persistent=False)
    partition, state = describe_model(model, OptimizerConfig(), ServerConfig())
    assert "cache" not in state.state_dict()
    assert "cache" not in {key.name for key in partition.keys}
    Replica(model, partition).reset_buffers()
    assert (model.cache == 1).all()


def test_a_model_without_buffers_has_no_buffer_part() -> None:
    replica = _replica(model=nn.Linear(3, 2))
    assert not replica.has_buffers
    assert replica.integers() == {}
