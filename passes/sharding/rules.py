"""All sharding rules: importing this registers those of every group."""

from __future__ import annotations

from trivium.passes.sharding import attention, movement, pointwise, products
from trivium.passes.sharding.table import RULES, apply

GROUPS = (attention, movement, pointwise, products)

__all__ = ["GROUPS", "RULES", "apply"]
