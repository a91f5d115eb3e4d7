"""Whether the cluster has room for a run's actors."""

from collections.abc import Mapping

import ray

from cluster.config import ClusterConfig
from paramserver.errors import ConfigError

__all__ = ["check_room", "resources"]


def check_room(config: ClusterConfig) -> None:
    """Refuse a run that can never be placed: Ray would leave its actors pending for ever.

    Raises:
        ConfigError: saying what is wanted and what there is.
    """
    wanted = {"CPU": config.worker.num_workers + config.servers.num_servers, "GPU": 0}
    if config.worker.device == "cuda" and not config.share_device:
        wanted["GPU"] = config.worker.num_workers
    there = ray.cluster_resources()
    for name, count in wanted.items():
        if count > there.get(name, 0):
            raise ConfigError(
                f"the run wants {wanted['CPU']} logical CPUs and {wanted['GPU']} GPUs, one for each worker and server, "
                f"but the cluster has {resources(there)}: lower --workers or --servers, or start nodes with more"
            )


def resources(amounts: Mapping[str, float]) -> str:
    """CPUs and GPUs of a cluster in words."""
    return f"{amounts.get('CPU', 0):.0f} logical CPUs and {amounts.get('GPU', 0):.0f} GPUs"
