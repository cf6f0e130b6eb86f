"""What a run is to do. Plain values."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    KILL_EXPERT = "kill-expert"
    STOP_EXPERT = "stop-expert"
    SLOW_EXPERT = "slow-expert"
    KILL_ROUTER = "kill-router"
    KILL_ATTENTION = "kill-attention"
    KILL_STORE = "kill-store"
    KILL_REDIS = "kill-redis"
    SCALE_EXPERTS = "scale-experts"
    HOLD_EXPERT_DEAD = "hold-expert-dead"
    KILL_NODE = "kill-node"
    FREEZE_NODE = "freeze-node"


# What is measured beside an equally long time without it.
HELD_SECONDS = 30.0
# Of whole machines: they need more than one node.
NODE_FAULTS = (Fault.KILL_NODE, Fault.FREEZE_NODE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long, and what: each time one of `faults` at random, those that are named twice twice as
    often. Between two faults passes up to `pause_seconds`. `num_nodes` of 1: a Ray of our own."""

    seconds: float
    max_faults: int | None
    faults: Sequence[Fault]
    streams: int
    pause_seconds: float
    seed: int
    num_nodes: int = 1
    preset: str = ""
