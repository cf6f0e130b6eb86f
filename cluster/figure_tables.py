"""A deployment's figures as tables for people: narrow enough for a terminal of 100 columns."""

from collections.abc import Sequence

from cluster.figures import (
    ExpertLoad,
    Figures,
    GatewayFigures,
    Latency,
    ReplicaFigures,
    RouterFigures,
    WorkerFigures,
)
from cluster.output import text_table
from protos import control_pb2


def figure_tables(told: Figures) -> str:
    """A role a table; times as p50/p99."""
    tables = (
        _gateways(told.gateways),
        _workers(told.workers),
        _routers(told.routers),
        _replicas(told.replicas),
    )
    return "\n\n".join((*tables, _experts(told.experts)))


def autoscale_table(autoscaled: Sequence[control_pb2.Autoscaled]) -> str:
    """What the deployment scales by itself, and what it did last."""
    return text_table(
        ("scaled by itself", "now", "limits", "busy", "queue", "last change"),
        [
            (
                "attention" if each.role == "attention" else f"expert group {each.expert_group}",
                str(each.replicas)
                if each.replicas == each.desired_replicas
                else f"{each.replicas}, {each.desired_replicas} wanted",
                f"{each.min_replicas} to {each.max_replicas}",
                _percent(each.busy_share if each.HasField("busy_share") else None),
                _duration(each.queue_seconds) if each.HasField("queue_seconds") else "-",
                f"{each.last_change_age_seconds:.0f} s ago, {each.last_change}"
                if each.last_change
                else "-",
            )
            for each in autoscaled
        ],
    )


def _gateways(gateways: Sequence[GatewayFigures]) -> str:
    return text_table(
        (
            *("gateway", "active", "req/s", "tok/s", "1st token", "finished", "cancelled"),
            *("rejected", "failed", "waited", "moved"),
        ),
        [
            (
                each.name,
                each.active,
                _number(each.requests_per_second),
                _number(each.tokens_per_second),
                _latency(each.first_token),
                each.finished,
                each.cancelled,
                each.rejected,
                each.failed,
                each.waits,
                each.continuations,
            )
            for each in gateways
        ],
    )


def _workers(workers: Sequence[WorkerFigures]) -> str:
    return text_table(
        (
            *("attention", "run", "wait", "tok/s", "busy", "full", "overlap", "queue"),
            *("1st token", "step", "crossing"),
        ),
        [
            (
                each.name,
                each.running,
                each.waiting,
                _number(each.tokens_per_second),
                _percent(each.in_steps_share),
                _percent(each.filled_share),
                _percent(each.overlapped_share),
                _latency(each.queue),
                _latency(each.first_token),
                _latency(each.step),
                _latency(each.crossing),
            )
            for each in workers
        ],
    )


def _routers(routers: Sequence[RouterFigures]) -> str:
    return text_table(
        (
            *("router", "cross/s", "answer", "resent", "hedged", "won", "probes", "breaks"),
            *("late", "wrong", "suspect", "wait", "failed"),
        ),
        [
            (
                each.name,
                _number(each.crossings_per_second),
                _latency(each.answer),
                each.resent_parts,
                each.hedged_parts,
                each.hedges_won,
                each.probe_parts,
                each.breaks,
                each.overdue_calls,
                each.wrong_answers,
                each.suspects,
                each.waiting_crossings,
                each.failed_crossings,
            )
            for each in routers
        ],
    )


def _replicas(replicas: Sequence[ReplicaFigures]) -> str:
    return text_table(
        ("expert", "group", "busy", "pairs/s", "compute", "answer", "slowness", "late", "failed"),
        [
            (
                each.name,
                each.group,
                _percent(each.busy_share),
                _number(each.pairs_per_second),
                _latency(each.compute),
                _latency(each.answer),
                "-" if each.slowness is None else round(each.slowness, 1),
                each.late_calls,
                each.failed_calls,
            )
            for each in replicas
        ],
    )


def _experts(load: ExpertLoad) -> str:
    if not load.hot:
        return "no expert was asked"
    hot = ", ".join(f"{each.expert} ({each.share:.1%})" for each in load.hot)
    balance = "" if load.balance is None else f"; mean over largest load {load.balance:.2f}"
    return f"hottest of {load.num_experts} experts: {hot}{balance}"


def _latency(latency: Latency | None) -> str:
    """4.0/9.6ms; the unit is said twice only where it differs."""
    if latency is None:
        return "-"
    p50, p99 = _duration(latency.p50), _duration(latency.p99)
    unit = p99.lstrip("0123456789.")
    same_unit = p50.lstrip("0123456789.") == unit
    return f"{p50.removesuffix(unit) if same_unit else p50}/{p99}"


def _duration(seconds: float) -> str:
    """Two or three digits and the unit."""
    if seconds >= 1:
        return f"{seconds:.1f}s"
    if seconds >= 0.001:
        return f"{1e3 * seconds:.{1 if seconds < 0.01 else 0}f}ms"
    return f"{1e6 * seconds:.0f}us" if seconds else "0"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _number(number: float | None) -> float | str:
    """Of a rate, no more digits than it has meaning."""
    if number is None:
        return "-"
    return round(number) if number >= 100 else round(number, 1)
