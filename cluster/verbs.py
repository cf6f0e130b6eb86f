"""The verbs that run a deployment, ask it one thing, or train and measure a model.

A verb's work is another module's, imported when it is asked for.
"""

import argparse
import asyncio
import secrets
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from cluster.config import SettingsError
from cluster.flags import (
    Arguments,
    Verb,
    access_of,
    add_client_flags,
    add_deployment_flags,
    add_flag,
    add_format_flag,
    add_salt_flag,
    add_sampling_flags,
    minutes,
    natural,
    positive,
    seconds,
    seed,
    settings_of,
    text,
    token_ids,
    wants_json,
)

# Beyond what the actors of a node may take to drain: for their replacements to start.
DRAIN_MARGIN_SECONDS = 60.0


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    add_deployment_flags(parser)
    parser.add_argument(
        "--prompt", type=text, metavar="TEXT", help="what to ask instead of the usual"
    )


def _demo(parsed: Arguments) -> None:
    from cluster.demo import PROMPT, demo

    # Any free port, unless one is asked for: whatever else runs here is not disturbed.
    demo(settings_of(parsed, defaults={"gateway.port": 0}), parsed.prompt or PROMPT)


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    add_deployment_flags(parser)


def _serve(parsed: Arguments) -> None:
    from cluster.serve import serve

    serve(settings_of(parsed))


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [FLAG ...] TEXT"  # all of them would be five lines of the screen
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "text", nargs="?", type=text, metavar="TEXT", help="the prompt; - reads stdin"
    )
    prompt.add_argument(
        "--token-ids", type=token_ids, metavar="1,2,3", help="the prompt as token ids, used as is"
    )
    add_sampling_flags(parser)
    parser.add_argument(
        "--session", type=text, default="", metavar="NAME", help="the prompt is its next turn"
    )
    add_salt_flag(parser)
    parser.add_argument("--local", action="store_true", help="in this process, without a server")
    add_flag(parser, "--model", "model.path", "DIR", "checkpoint of --local")
    add_flag(parser, "--dtype", "model.dtype", "NAME", "of --local: float32 or bfloat16")
    add_client_flags(parser)


def _generate(parsed: Arguments) -> None:
    if parsed.local and (parsed.session or parsed.cache_salt):
        raise SettingsError(
            "--local keeps nothing: neither --session nor --cache-salt goes with it"
        )
    if parsed.local and parsed.endpoint:
        raise SettingsError(f"--endpoint {parsed.endpoint}: with --local there is nobody to ask")
    for flag, key in (("--model", "model.path"), ("--dtype", "model.dtype")):
        value = getattr(parsed, key)
        if value is not None and not parsed.local:
            raise SettingsError(f"{flag} {value}: the gateway has its own; it goes with --local")
    from cluster.client import Question
    from cluster.generate import generate

    prompt = parsed.token_ids or (_stdin_text() if parsed.text == "-" else parsed.text)
    question = Question(
        prompt=prompt,
        max_tokens=parsed.max_tokens,
        temperature=parsed.temperature,
        top_p=parsed.top_p,
        seed=parsed.seed,
        session_id=parsed.session,
        cache_salt=parsed.cache_salt,
    )
    settings = settings_of(parsed)
    at = None if parsed.local else access_of(parsed)
    asyncio.run(generate(settings, question, at=at, as_json=wants_json(parsed)))


def _stdin_text() -> str:
    try:
        return text(sys.stdin.read())
    except (UnicodeDecodeError, argparse.ArgumentTypeError):
        raise SettingsError("what came on stdin is not UTF-8") from None


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--health", action="store_true", help="only whether the gateway serves, for probes"
    )
    add_client_flags(parser)


def _status(parsed: Arguments) -> None:
    from cluster.health import health
    from cluster.status import status

    if parsed.health:
        asyncio.run(health(access_of(parsed)))
    else:
        asyncio.run(status(access_of(parsed), as_json=wants_json(parsed)))


def _top_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--interval", type=seconds, default=2.0, metavar="S", help="of each look")
    parser.add_argument("--once", action="store_true", help="one look, and leave")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write the load, for `plan autoscale --trace`"
    )
    add_client_flags(parser)


def _top(parsed: Arguments) -> None:
    from cluster.top import top

    with suppress(KeyboardInterrupt):  # how one leaves it
        asyncio.run(
            top(
                access_of(parsed),
                interval_seconds=parsed.interval,
                once=parsed.once,
                as_json=wants_json(parsed),
                record=parsed.record,
            )
        )


def _scale_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True, metavar="experts|attention|balance")
    words = "how many replicas every expert group has, or one"
    experts = what.add_parser("experts", help=words, description=words)
    experts.add_argument("--group", type=natural, metavar="G", help="this one alone; from 0")
    words = "how many attention workers there are"
    attention = what.add_parser("attention", help=words, description=words)
    words = "move experts, so that all replicas have the same work"
    balance = what.add_parser("balance", help=words, description=words)
    balance.add_argument("--dry-run", action="store_true", help="only say what would be moved")
    for each in (experts, attention):
        each.add_argument("--replicas", type=positive, required=True, metavar="N")
    for each in (experts, attention, balance):
        add_client_flags(each)


def _scale(parsed: Arguments) -> None:
    from cluster.scale import ScaleCommand

    command = ScaleCommand(access=access_of(parsed), as_json=wants_json(parsed))
    if parsed.what == "experts":
        asyncio.run(command.experts(parsed.replicas, parsed.group))
    elif parsed.what == "balance":
        asyncio.run(command.rebalance(dry_run=parsed.dry_run))
    else:
        asyncio.run(command.attention(parsed.replicas))


def _drain_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "actor", type=text, nargs="?", metavar="ACTOR", help="its name, such as expert-0-1"
    )
    words = "all on the Ray node of this address or id, after their replacements"
    which.add_argument("--node", type=text, metavar="NODE", help=words)
    add_client_flags(parser)


def _drain(parsed: Arguments) -> None:
    from cluster.scale import ScaleCommand

    command = ScaleCommand(access=access_of(parsed), as_json=wants_json(parsed))
    if parsed.node is None:
        asyncio.run(command.drain(parsed.actor))
    else:
        patience_seconds = settings_of(parsed).cluster.drain_seconds + DRAIN_MARGIN_SECONDS
        asyncio.run(command.drain_node(parsed.node, patience_seconds))


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="nano", metavar="NAME")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=positive, metavar="N", help="instead of the preset's")
    parser.add_argument("--resume", action="store_true", help="go on from what DIR holds")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))


def _train(parsed: Arguments) -> None:
    from model1.train.loop import train

    train(parsed.preset, parsed.out, parsed.device, steps=parsed.steps, resume=parsed.resume)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    words = "a deployment against one process, batch 32"
    serve = what.add_parser("serve", help=words, description=words)
    serve.add_argument("--pairs", type=positive, default=5, metavar="N", help="runs of each side")
    words = "a layer crossing against bare gRPC, micro-batches, replicas"
    dispatch = what.add_parser("dispatch", help=words, description=words)
    dispatch.add_argument(
        "--part",
        action="append",
        choices=("hop", "overlap", "emulated-overlap", "replicas"),
        help="this one alone; may be given again",
    )
    dispatch.add_argument(
        "--batch",
        type=positive,
        action="append",
        metavar="N",
        help="sequences of a step; may be given again (2, 8, 16, 32, 64)",
    )
    dispatch.add_argument("--steps", type=positive, metavar="N", help="timed, of each way (32)")
    dispatch.add_argument("--quick", action="store_true", help="few steps: to see that it works")
    dispatch.add_argument(
        "--gigabytes-per-second",
        type=seconds,
        default=2.0,
        metavar="N",
        help="of weights, that emulated replicas read",
    )
    words = "experts whose load drifts in a live deployment: balance, gaps between tokens"
    balance = what.add_parser("balance", help=words, description=words)
    balance.add_argument("--drifts", type=positive, default=3, metavar="N", help="the start is one")
    balance.add_argument(
        "--every", type=seconds, default=60.0, metavar="T", help="between two drifts"
    )
    balance.add_argument("--replicas", type=positive, default=8, metavar="N", help="of experts")
    balance.add_argument("--streams", type=positive, default=4, metavar="N", help="of tokens")
    balance.add_argument(
        "--crossings", type=positive, default=25, metavar="N", help="of 32 rows, a second"
    )
    balance.add_argument("--seed", type=seed, default=0, metavar="S")
    words = "the forward pass against transformers'"
    model = what.add_parser("model", help=words, description=words)
    model.add_argument("--steps", type=positive, default=20, metavar="N", help="timed, of each")
    model.add_argument("--quick", action="store_true", help="leave out the long context")
    words = "KV in FP8 against KV in bfloat16: bytes, speed, logits, recall"
    fp8 = what.add_parser("fp8", help=words, description=words)
    fp8.add_argument("--steps", type=positive, default=30, metavar="N", help="timed, of each")
    fp8.add_argument("--probes", type=positive, default=100, metavar="N", help="lists to recall")
    words = "KV tiers: device memory saved, time to resume, bandwidth, cost without reuse"
    kv = what.add_parser("kv", help=words, description=words)
    kv.add_argument(
        "--part",
        action="append",
        choices=("budget", "resume", "bandwidth", "no-reuse"),
        help="this one alone; may be given again",
    )
    kv.add_argument("--quick", action="store_true", help="short sessions, few repetitions")
    kv.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as SVG or PNG")
    for each in (serve, dispatch, balance, model, fp8, kv):
        add_format_flag(each)


def _bench(parsed: Arguments) -> None:
    if parsed.what == "serve":
        from cluster.bench_serve import bench_serve

        bench_serve(num_pairs=parsed.pairs, as_json=wants_json(parsed))
    elif parsed.what == "dispatch":
        from cluster.bench_dispatch.bench import PARTS as DISPATCH_PARTS
        from cluster.bench_dispatch.bench import QUICK, Scale, bench_dispatch

        scale = QUICK if parsed.quick else Scale()
        scale = replace(
            scale,
            batches=tuple(parsed.batch or scale.batches),
            steps=parsed.steps or scale.steps,
        )
        bench_dispatch(
            parsed.part or DISPATCH_PARTS,
            scale,
            gigabytes_per_second=parsed.gigabytes_per_second,
            as_json=wants_json(parsed),
        )
    elif parsed.what == "balance":
        from cluster.bench_balance.bench import Plan, bench_balance

        plan = Plan(
            drifts=parsed.drifts,
            every_seconds=parsed.every,
            replicas=parsed.replicas,
            streams=parsed.streams,
            crossings_per_second=parsed.crossings,
            seed=parsed.seed,
        )
        bench_balance(plan, as_json=wants_json(parsed))
    elif parsed.what == "kv":
        from cluster.bench_kv.bench import PARTS, bench_kv

        parts = parsed.part or PARTS
        bench_kv(parts, quick=parsed.quick, as_json=wants_json(parsed), plot=parsed.plot)
    elif parsed.what == "fp8":
        import model1.bench_fp8

        model1.bench_fp8.run(parsed.steps, parsed.probes, wants_json(parsed))
    else:
        import model1.bench

        model1.bench.run(parsed.steps, wants_json(parsed), long_context=not parsed.quick)


def _chaos_arguments(parser: argparse.ArgumentParser) -> None:
    from cluster.chaos.plan import NODE_FAULTS, Fault
    from cluster.chaos.presets import PRESETS

    what = parser.add_subparsers(dest="what", required=True, metavar="run")
    words = "a deployment here, known questions, random faults, every token compared"
    run = what.add_parser("run", help=words, description=words)
    run.add_argument("--preset", choices=[*PRESETS], help=_preset_words())
    run.add_argument("--minutes", type=minutes, metavar="M", help="at most; 10 without a preset")
    run.add_argument("--max-faults", type=positive, metavar="N", help="end after so many")
    run.add_argument("--pause", type=seconds, metavar="T", help="at most, in between; 2 s")
    run.add_argument("--streams", type=positive, default=16, metavar="N", help="at the same time")
    run.add_argument("--seed", type=seed, metavar="S", help="of questions and faults")
    run.add_argument(
        "--only",
        action="append",
        choices=[fault.value for fault in Fault if fault not in NODE_FAULTS],
        help="this fault; may be given again",
    )
    add_deployment_flags(run)
    add_format_flag(run)


def _preset_words() -> str:
    from cluster.chaos.presets import PRESETS

    return "; ".join(f"{name}: {preset.words}" for name, preset in PRESETS.items())


def _chaos(parsed: Arguments) -> None:
    from cluster.chaos.plan import Fault, Plan
    from cluster.chaos.presets import PRESETS, SOAK
    from cluster.chaos.run import chaos_run

    preset = PRESETS[parsed.preset] if parsed.preset else SOAK
    # Any free port is good. A step with a long piece of somebody's prompt in it would be a longer
    # pause than most of what is measured here.
    defaults: dict[str, object] = {"gateway.port": 0, "attention.max_batch_tokens": 96}
    defaults |= {f"topology.{name}": value for name, value in preset.topology.items()}
    defaults |= {f"cluster.{name}": value for name, value in preset.cluster.items()}
    settings = settings_of(parsed, defaults=defaults)
    if preset.num_nodes > 1 and settings.cluster.ray_address is not None:
        raise SettingsError(f"--preset {parsed.preset} starts nodes of its own: no --ray-address")
    has_redis = settings.kv.enabled and settings.kv.redis == "embedded"
    impossible = {
        Fault.KILL_STORE: None if settings.kv.enabled else "KV store",
        Fault.KILL_REDIS: None if has_redis else "Redis of its own",
    }
    for fault in map(Fault, parsed.only or ()):
        if lacking := impossible.get(fault):
            raise SettingsError(f"--only {fault}: the deployment has no {lacking}")
    faults = [Fault(each) for each in parsed.only or preset.faults]
    plan = Plan(
        preset=parsed.preset or "",
        seconds=(parsed.minutes or preset.minutes) * 60,
        max_faults=parsed.max_faults or preset.max_faults,
        faults=[fault for fault in faults if not impossible.get(fault)],
        streams=parsed.streams,
        pause_seconds=preset.pause_seconds if parsed.pause is None else parsed.pause,
        seed=secrets.randbits(32) if parsed.seed is None else parsed.seed,
        num_nodes=preset.num_nodes,
    )
    chaos_run(settings, plan, as_json=wants_json(parsed))


VERBS = {
    "chaos": Verb("do harm to a deployment under load, and see", _chaos_arguments, _chaos),
    "demo": Verb("run a whole deployment here, ask it one thing, stop", _demo_arguments, _demo),
    "serve": Verb("run a deployment until SIGTERM", _serve_arguments, _serve),
    "generate": Verb("answer one prompt", _generate_arguments, _generate),
    "status": Verb("show what a deployment consists of", _status_arguments, _status),
    "top": Verb("show what it does, live", _top_arguments, _top),
    "scale": Verb("change how many actors compute", _scale_arguments, _scale),
    "drain": Verb("take one actor out, or all on a node", _drain_arguments, _drain),
    "bench": Verb("measure on random weights of the mini model", _bench_arguments, _bench),
    "train": Verb("train a small model from scratch", _train_arguments, _train),
}
