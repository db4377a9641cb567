"""Which channels of a graph have to go together, and how to take them out.

Every axis of every value is a row of *elements*, one for each index. Operators tie elements that
cannot be removed without each other (`rules`), or pin what they cannot follow, with the reason.
What is tied together is a *unit* (`units`): a channel with all that is added to it, a head with
its keys and values, a neuron. `rank` says what a unit is worth, `shrink` removes units and makes
weights, shapes and attributes smaller.

Removing a unit is exact: the smaller graph computes what the whole one would if every product
found zeros where it reads the unit.
"""

from __future__ import annotations
