"""One Ray cluster for the runs that are disturbed, and what each task gives undisturbed."""

from collections.abc import Iterator

import pytest

from launch.drivers import param_server_session
from tests.support.disturbed import Undisturbed


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with param_server_session(None, workers=6, servers=3, model_bytes=64 << 20, transport="ray"):
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))
