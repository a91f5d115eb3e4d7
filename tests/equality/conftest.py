"""One Ray cluster for the parameter-server runs of a module."""

from collections.abc import Iterator

import pytest

from launch.drivers import param_server_session


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with param_server_session(None, workers=4, servers=3, model_bytes=64 << 20, transport="ray"):
        yield
