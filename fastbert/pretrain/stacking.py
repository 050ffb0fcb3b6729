"""Progressive stacking: a deeper model from a trained shallow one."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

# How many depths a run with ``Options.stack`` has -> where it grows, as parts of the whole. Gong et
# al. (ICML 2019, section 4) give 3, 6 and 12 layers 50, 70 and 280 thousand steps.
GROWTH: dict[int, tuple[float, ...]] = {0: (), 1: (), 2: (0.3,), 3: (0.125, 0.3)}

_LAYER = re.compile(r"(.*encoder\.layer\.)(\d+)(\..*)")


def stack(named: Mapping[str, Value], *, within: str = "bert.") -> dict[str, Value]:
    """Of a model of L layers, the one of 2 L in which layers i and i + L both begin as layer i
    (Gong et al., Efficient Training of BERT by Progressively Stacking, ICML 2019, algorithm 1).

    named: by name of the parameter, whatever belongs to it: its values (a state_dict) or its
        moments in the optimiser, a dict of tensors; each new entry is a copy. What belongs to no
        layer stays as it is.
    within: what names of the encoder begin with; a generator beside it keeps its layers.
    Raises ValueError where there are no layers, or some are missing.
    """
    found = {
        name: match
        for name in named
        if name.startswith(within) and (match := _LAYER.fullmatch(name))
    }
    numbers = {int(match[2]) for match in found.values()}
    count = len(numbers)
    if not count or numbers != set(range(count)):
        raise ValueError(
            f"named: got layers {sorted(numbers)} in {within}, expected all from 0 on, one or more"
        )
    stacked = dict(named)
    for name, match in found.items():
        above = f"{match[1]}{int(match[2]) + count}{match[3]}"
        stacked[above] = copy.deepcopy(named[name])
    return stacked


def stack_all(named: Mapping[str, Value]) -> dict[str, Value]:
    """``stack`` of the encoder, and of a generator beside it, which is as deep."""
    stacked = stack(named)
    if any(name.startswith("heads.") and ".encoder.layer." in name for name in named):
        stacked = stack(stacked, within="heads.")
    return stacked
