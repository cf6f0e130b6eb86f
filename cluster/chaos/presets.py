"""The runs that show one thing each: which faults, on what, and what it is to come to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.chaos.plan import NODE_FAULTS, Fault
from cluster.chaos.verdicts import (
    Report,
    Verdict,
    kept_blocks,
    longest_gap,
    recomputed,
    recovery,
    slowed_tail,
    stall,
    throughput,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """`topology` and `cluster` are settings of those sections. It ends after `max_faults`, or
    `minutes`."""

    words: str
    faults: Sequence[Fault]
    max_faults: int | None
    topology: Mapping[str, int]
    cluster: Mapping[str, object] = field(default_factory=dict)
    minutes: float = 12.0
    pause_seconds: float = 1.0
    num_nodes: int = 1
    judges: Sequence[Callable[[Report], Verdict]] = field(default=())


def _topology(workers: int, groups: int, replicas: int) -> dict[str, int]:
    return {
        "attention_workers": workers,
        "expert_groups": groups,
        "expert_replicas": replicas,
    }


# Of everything that is killed there is another one, but for what is one a node.
SOAK = Preset(
    words="everything at random",
    faults=tuple(fault for fault in Fault if fault not in (*NODE_FAULTS, Fault.HOLD_EXPERT_DEAD)),
    max_faults=None,
    topology=_topology(2, 2, 2),
    minutes=10.0,
    pause_seconds=2.0,
)
PRESETS = {
    "scale": Preset(
        words="groups at random, step by step from 1 replica to 4 and back",
        faults=(Fault.SCALE_EXPERTS,),
        max_faults=200,
        topology=_topology(1, 2, 1),
        minutes=16.0,
        pause_seconds=0.5,
        judges=(longest_gap(0.25, steps=2), kept_blocks),
    ),
    "kill-experts": Preset(
        words="expert replicas die or freeze, there is another one of each",
        faults=(*[Fault.KILL_EXPERT] * 6, Fault.STOP_EXPERT),
        max_faults=120,
        topology=_topology(1, 2, 2),
        cluster={"spare_experts": True},
        judges=(stall(Fault.KILL_EXPERT, 0.5, 0.1), stall(Fault.KILL_EXPERT, 0.99, 0.3)),
    ),
    "kill-last-expert": Preset(
        words="the only replica of a group dies",
        faults=(Fault.KILL_EXPERT,),
        max_faults=20,
        topology=_topology(1, 2, 1),
        cluster={"spare_experts": True},
        pause_seconds=8.0,
        judges=(stall(Fault.KILL_EXPERT, 0.5, None), recovery(Fault.KILL_EXPERT, None)),
    ),
    "dead-expert": Preset(
        words="one replica of eight is dead for a while, again and again",
        faults=(Fault.HOLD_EXPERT_DEAD,),
        max_faults=6,
        topology=_topology(1, 2, 4),
        judges=(throughput(0.98), stall(Fault.HOLD_EXPERT_DEAD, 0.99, None)),
    ),
    "kill-front": Preset(
        words="routers and attention workers die, one of each on each of two nodes",
        faults=(Fault.KILL_ROUTER, Fault.KILL_ATTENTION),
        max_faults=100,
        topology=_topology(2, 1, 1),
        num_nodes=2,
        judges=(
            stall(Fault.KILL_ROUTER, 0.5, 0.4),
            stall(Fault.KILL_ROUTER, 0.99, None),
            stall(Fault.KILL_ATTENTION, 0.5, 0.4),
            stall(Fault.KILL_ATTENTION, 0.99, None),
            recomputed,
        ),
    ),
    "slow-expert": Preset(
        words="one replica of two has a tenth of its speed",
        faults=(Fault.SLOW_EXPERT,),
        max_faults=6,
        topology=_topology(1, 1, 2),
        pause_seconds=5.0,
        judges=(slowed_tail(5.0, factor=2.0),),
    ),
    "lose-node": Preset(
        words="a node of three is killed, or freezes with all that is on it",
        faults=(Fault.KILL_NODE, Fault.FREEZE_NODE),
        max_faults=4,
        topology=_topology(2, 1, 3),
        num_nodes=3,
        pause_seconds=2.0,
        judges=(recovery(Fault.KILL_NODE, None), recovery(Fault.FREEZE_NODE, None)),
    ),
}
