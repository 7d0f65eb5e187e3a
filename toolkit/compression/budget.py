"""Whether a FLOPs budget can be reached: known before anything expensive has run."""

from __future__ import annotations

import math
from typing import Any

from toolkit import units
from toolkit.config import Flops
from toolkit.errors import UsageError


def require_reachable(check_meta: dict[str, Any], budget: Flops, divisor: int) -> None:
    """Raise UsageError when a budget cannot be reached; nothing is asked of a budget above the baseline."""
    limit = budget.resolve(check_meta["flops"])
    if limit >= check_meta["flops"]:
        return
    smallest = check_meta["smallest"]
    if smallest is None:
        raise UsageError(check_meta["obstacle"], "keep the whole network with --flops 100%")
    if limit < smallest:
        share = smallest / check_meta["flops"]
        raise UsageError(
            f"the FLOPs budget of {budget} cannot be reached: with channel divisor {divisor} the smallest network "
            f"has {units.flops(smallest)} ({share:.1%} of {units.flops(check_meta['flops'])})",
            f"ask for --flops {math.ceil(share * 100)}% or more, or lower channel_divisor in the profile",
        )
