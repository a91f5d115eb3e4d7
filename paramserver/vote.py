"""A step is taken whole or not at all: servers report norms, one decision holds for all (E8)."""

import math
from collections.abc import Sequence

from paramserver.config import OptimizerConfig
from paramserver.messages import Decision, Report

__all__ = ["decide"]


def decide(reports: Sequence[Report], config: OptimizerConfig) -> Decision:
    """Add squared norms in key order and choose: apply, apply scaled, or drop.

    The order of the sum is that of keys and pieces, never that of servers, so that the number of servers does not
    change a bit. Clipping matches ``torch.nn.utils.clip_grad_norm_``: factor ``max / (norm + 1e-6)`` if below 1.
    """
    pieces = sorted(piece for report in reports for piece in report.squared_norms)
    total = 0.0
    for _, _, key, square in pieces:
        if not math.isfinite(square):
            return Decision(apply=False, scale=1.0, norm=square, key=key)
        total += square
    norm = math.sqrt(total)
    limit = config.clip_grad_norm
    scale = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
    return Decision(apply=True, scale=scale, norm=norm)
