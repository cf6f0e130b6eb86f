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
    KILL_REDIS = "kill-redis"
    SCALE_EXPERTS = "scale-experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long, and what. Between two faults passes up to `pause_seconds`."""

    seconds: float
    max_faults: int | None
    faults: Sequence[Fault]
    streams: int
    pause_seconds: float
    seed: int
