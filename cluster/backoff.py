"""How long to wait before a process that ended is started again. Plain numbers; knows no clock."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """At once the first time, later twice as long each time. A process that lived for
    `stable_seconds` makes the next one a first time again."""

    first_delay_seconds: float = 0.5
    max_delay_seconds: float = 30.0
    stable_seconds: float = 10.0


class Backoff:
    """Of one actor."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._num_restarts = 0

    def delay_seconds(self, lived_seconds: float) -> float:
        """After a process that served for so long; 0 if it never did."""
        if lived_seconds >= self._policy.stable_seconds:
            self._num_restarts = 0
        self._num_restarts += 1
        if self._num_restarts == 1:
            return 0.0
        doublings = min(self._num_restarts - 2, 30)  # a float has an end
        return min(
            self._policy.first_delay_seconds * 2.0**doublings, self._policy.max_delay_seconds
        )
