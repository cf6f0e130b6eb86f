"""The verb that tries out policies without a deployment: `plan`.

What it does is another module's, imported when it is asked for.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from cluster.flags import Arguments, Verb, add_format_flag, positive, ratio, seed, wants_json


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
    for each in (experts,):
        each.add_argument("--seed", type=seed, default=0, metavar="S")
        each.add_argument("--plot", type=Path, metavar="FILE", help="write curves as SVG or PNG")
        add_format_flag(each)


def _plan(parsed: Arguments) -> None:
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


VERBS = {"plan": Verb("try out balance and scaling policies", _plan_arguments, _plan)}
