"""Settings of a run: values that cannot work, and text that has a structure."""

import pytest

from launch.config import Backend, RunConfig, parse_image_size, parse_pairs
from paramserver.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("workers", 0, "--workers is 0: it must be 1 or more"),
        ("batch_size", -1, "--batch-size is -1: it must be 1 or more"),
        ("eval_every", -1, "--eval-every is -1: it must be 0 or more"),
        ("step_timeout", 0.0, "--step-timeout is 0.0: it must be above 0 seconds"),
        ("backend", "dpp", "backend is 'dpp': use one of single, ps, ddp"),
        ("wire_precision", "fp8", "wire_precision is 'fp8': use one of fp32, bf16, fp16"),
    ],
)
def test_value_that_cannot_work(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(**{field: value})


@pytest.mark.parametrize("backend", ["single", "ddp"])
def test_only_ps_has_a_wire(backend: Backend) -> None:
    with pytest.raises(ConfigError, match=f"bf16 with --backend {backend}: only ps .*; say --backend ps or --wire"):
        RunConfig(backend=backend, wire_precision="bf16")


@pytest.mark.parametrize(
    ("text", "size"),
    [(None, None), (256, (256, 256)), ("256", (256, 256)), ("320x480", (320, 480)), ("320,480", (320, 480))],
)
def test_image_size(text: int | str | None, size: tuple[int, int] | None) -> None:
    assert parse_image_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "a", "3x", "3x4x5", "-3", "0", "3.5", "1e2"])
def test_image_size_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is neither a number nor HxW"):
        parse_image_size(text)


def test_pairs() -> None:
    assert parse_pairs("head.*=10, bias=2e-1") == (("head.*", 10.0), ("bias", 0.2))
    for text in ("", "head", "head=", "head=x", "a=1,,b=2"):
        with pytest.raises(ConfigError, match="is not PATTERN=FACTOR"):
            parse_pairs(text)
