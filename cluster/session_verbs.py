"""The verbs about what outlives a request: `session`, `chat` and `kv`.

A verb's work is another module's, imported when it is asked for.
"""

import argparse
import asyncio
from pathlib import Path

from cluster.flags import (
    Arguments,
    Verb,
    access_of,
    add_client_flags,
    add_format_flag,
    add_salt_flag,
    add_sampling_flags,
    num_bytes,
    positive,
    seconds,
    seed,
    text,
    wants_json,
)


def _session_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")

    def add(name: str, words: str) -> argparse.ArgumentParser:
        each = what.add_parser(name, help=words, description=words)
        if name != "list":
            each.add_argument("session", type=text, metavar="NAME")
        add_salt_flag(each)
        return each

    listed = add("list", "the sessions of a salt, the last used first")
    listed.add_argument("--max", type=positive, default=1000, metavar="N")
    shown = add("show", "one session, and in which tier its KV is")
    shown.add_argument("--history", action="store_true", help="with all that was said")
    pinned = add("pin", "keep its KV on its node for a time")
    pinned.add_argument("--for", dest="seconds", type=seconds, required=True, metavar="TIME")
    verbs = [
        *(listed, shown, pinned),
        add("unpin", "let its KV age again"),
        add("prefetch", "bring its KV into memory ahead of the next turn"),
        add("release", "give the device memory back that its KV takes"),
    ]
    deleted = add("delete", "forget what was said")
    deleted.add_argument("--with-kv", action="store_true", help="and its KV, in every tier")
    exported = add("export", "write history and KV to a file")
    exported.add_argument("file", type=Path, metavar="FILE")
    exported.add_argument("--without-kv", action="store_true", help="the history alone")
    imported = add("import", "begin a session from an exported file")
    imported.add_argument("file", type=Path, metavar="FILE")
    for each in (*verbs, deleted, exported, imported):
        add_client_flags(each)


def _session(parsed: Arguments) -> None:
    from cluster.session import SessionCommand

    command = SessionCommand(
        access=access_of(parsed), cache_salt=parsed.cache_salt, as_json=wants_json(parsed)
    )
    match parsed.what:
        case "list":
            asyncio.run(command.list_all(parsed.max))
        case "show":
            asyncio.run(command.show(parsed.session, with_history=parsed.history))
        case "pin":
            asyncio.run(command.pin(parsed.session, parsed.seconds))
        case "unpin":
            asyncio.run(command.unpin(parsed.session))
        case "prefetch":
            asyncio.run(command.prefetch(parsed.session))
        case "release":
            asyncio.run(command.release(parsed.session))
        case "delete":
            asyncio.run(command.delete(parsed.session, with_kv=parsed.with_kv))
        case "export":
            asyncio.run(command.export(parsed.session, parsed.file, without_kv=parsed.without_kv))
        case "import":
            asyncio.run(command.import_from(parsed.session, parsed.file))


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--session",
        type=text,
        default="",
        metavar="NAME",
        help="default: one that ends with the chat",
    )
    add_salt_flag(parser)
    add_sampling_flags(parser)
    add_client_flags(parser)


def _chat(parsed: Arguments) -> None:
    from cluster.chat import chat
    from cluster.client import Question

    question = Question(
        prompt="",
        max_tokens=parsed.max_tokens,
        temperature=parsed.temperature,
        top_p=parsed.top_p,
        seed=parsed.seed,
        session_id=parsed.session,
        cache_salt=parsed.cache_salt,
    )
    chat(access_of(parsed), question, as_json=wants_json(parsed))


def _kv_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")

    def add(name: str, words: str) -> argparse.ArgumentParser:
        each = what.add_parser(name, help=words, description=words)
        add_client_flags(each)
        return each

    add("stat", "what each tier holds and gave back")
    verified = add("verify", "read everything in a tier and check it")
    verified.add_argument("--repair", action="store_true", help="forget what is damaged")
    evicted = add("evict", "let the least useful KV of a tier go")
    evicted.add_argument(
        "--bytes", type=num_bytes, required=True, metavar="N", help="such as 64MiB, of each store"
    )
    for each in (verified, evicted):
        each.add_argument("--tier", choices=("ram", "disk", "redis"), required=True)
    add("gc", "forget what outlived its time, and what dead workers left")
    words = "what eviction policies are worth on made-up traffic, in this process"
    simulated = what.add_parser("simulate", help=words, description=words)
    simulated.add_argument("--requests", type=positive, default=5000, metavar="N")
    simulated.add_argument("--seed", type=seed, default=0, metavar="S")
    simulated.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as SVG")
    add_format_flag(simulated)


def _kv(parsed: Arguments) -> None:
    if parsed.what == "simulate":
        from cluster.kv_simulate import kv_simulate

        kv_simulate(parsed.requests, seed=parsed.seed, plot=parsed.plot, as_json=wants_json(parsed))
        return
    from cluster.kv import KvCommand

    command = KvCommand(access=access_of(parsed), as_json=wants_json(parsed))
    match parsed.what:
        case "stat":
            asyncio.run(command.stat())
        case "verify":
            asyncio.run(command.verify(parsed.tier, repair=parsed.repair))
        case "evict":
            asyncio.run(command.evict(parsed.tier, parsed.bytes))
        case "gc":
            asyncio.run(command.collect())


VERBS = {
    "session": Verb("see and manage conversations", _session_arguments, _session),
    "chat": Verb("talk, a line at a time", _chat_arguments, _chat),
    "kv": Verb("see and manage where KV is kept", _kv_arguments, _kv),
}
