"""The verb that tries out policies without a deployment: `plan`.

What it does is another module's, imported when it is asked for.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from cluster.flags import (
    Arguments,
    Verb,
    above_zero,
    add_format_flag,
    positive,
    probability,
    ratio,
    seed,
    wants_json,
)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    words = "balance experts whose load is skewed and drifts, in simulated time"
    experts = what.add_parser("experts", help=words, description=words)
    experts.add_argument("--experts", type=positive, default=256, metavar="N")
    experts.add_argument("--replicas", type=positive, default=32, metavar="N")
    experts.add_argument(
        "--redundancy", type=ratio, default=0.125, metavar="X", help="more copies, of N experts"
    )
    experts.add_argument("--zipf", type=ratio, default=1.2, metavar="X", help="how skewed")
    experts.add_argument("--topk", type=positive, default=6, metavar="K", help="experts of a row")
    experts.add_argument("--rows", type=positive, default=100_000, metavar="N", help="a second")
    experts.add_argument("--drifts", type=positive, default=5, metavar="N")
    words = "scale a role's replicas under made-up or recorded load, in simulated time"
    scaled = what.add_parser("autoscale", help=words, description=words)
    scaled.add_argument(
        "--trace", type=Path, metavar="FILE", help="CSV: seconds,requests_per_second"
    )
    scaled.add_argument(
        "--peak", type=above_zero, default=200.0, metavar="X", help="requests/s, if made up"
    )
    scaled.add_argument(
        "--replica-rate", type=above_zero, default=10.0, metavar="X", help="requests/s of one"
    )
    scaled.add_argument(
        "--start-seconds", type=positive, default=30, metavar="N", help="until one is ready"
    )
    scaled.add_argument("--busy-share", type=probability, default=0.7, metavar="X", help="aim")
    scaled.add_argument("--queue-seconds", type=above_zero, default=0.5, metavar="X", help="aim")
    scaled.add_argument("--max-replicas", type=positive, default=64, metavar="N")
    for each in (experts, scaled):
        each.add_argument("--seed", type=seed, default=0, metavar="S")
        each.add_argument("--plot", type=Path, metavar="FILE", help="write curves as SVG or PNG")
        add_format_flag(each)


def _plan(parsed: Arguments) -> None:
    if parsed.what == "experts":
        _experts(parsed)
    else:
        _autoscale(parsed)


def _experts(parsed: Arguments) -> None:
    from cluster.plan.expert_drift import Scenario
    from cluster.plan.experts import plan_experts

    usual = Scenario()
    scenario = replace(
        usual,
        num_experts=parsed.experts,
        num_replicas=parsed.replicas,
        zipf_exponent=parsed.zipf,
        topk=parsed.topk,
        rows_per_second=parsed.rows,
        num_drifts=parsed.drifts,
        settings=replace(usual.settings, redundancy=parsed.redundancy),
    )
    plan_experts(scenario, seed=parsed.seed, plot=parsed.plot, as_json=wants_json(parsed))


def _autoscale(parsed: Arguments) -> None:
    from cluster.autoscale import ScalingSettings
    from cluster.plan.autoscale import plan_autoscale
    from cluster.plan.fleet import FleetScenario

    settings = ScalingSettings(
        busy_share=parsed.busy_share,
        queue_seconds=parsed.queue_seconds,
        max_replicas=parsed.max_replicas,
    )
    scenario = FleetScenario(
        settings=settings, replica_rate=parsed.replica_rate, start_seconds=parsed.start_seconds
    )
    plan_autoscale(
        scenario,
        trace=parsed.trace,
        peak=parsed.peak,
        seed=parsed.seed,
        plot=parsed.plot,
        as_json=wants_json(parsed),
    )


VERBS = {"plan": Verb("try out balance and scaling policies", _plan_arguments, _plan)}
