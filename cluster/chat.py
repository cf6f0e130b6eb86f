"""`model1 chat`: a conversation in the terminal, or from a pipe, a line at a time.

The history is the deployment's: what is kept here is the session's name. A line is the next prompt
as it is, without a template.
"""

import asyncio
import secrets
import sys
from collections.abc import Iterator
from dataclasses import replace

from cluster.access import Access
from cluster.client import (
    Question,
    RequestFailed,
    RequestRefused,
    connected,
    named_failures,
)
from cluster.generate import collect, end_line
from protos import sessions_pb2, sessions_pb2_grpc

PROMPT = "> "


def chat(access: Access, question: Question, *, as_json: bool) -> None:
    """Ask every line of stdin as a turn of the question's session, of one of our own if it has
    none. At a terminal a turn that fails is told and the chat goes on, and Ctrl-C ends an answer;
    with a pipe the first failure ends the chat."""
    is_ours = not question.session_id
    if is_ours:
        question = replace(question, session_id=f"chat-{secrets.token_hex(8)}")
    num_turns = 0
    with asyncio.Runner() as runner:
        try:
            for line in _lines():
                try:
                    turn = _turn(access, replace(question, prompt=line), as_json=as_json)
                    runner.run(turn)
                    num_turns += 1
                except (RequestFailed, RequestRefused) as error:
                    if not sys.stdin.isatty():
                        raise
                    print(f"model1: {error}", file=sys.stderr)
                except KeyboardInterrupt:
                    if not sys.stdin.isatty():
                        raise
                    print()
        finally:
            if is_ours and num_turns:
                runner.run(_forget(access, question))


async def _turn(access: Access, question: Question, *, as_json: bool) -> None:
    async with connected(access) as client:
        answer = await collect(client.ask(question), echo=not as_json)
    if as_json:
        print(answer.as_json(), flush=True)
    elif sys.stdin.isatty():
        print(end_line(answer.end), file=sys.stderr)


async def _forget(access: Access, question: Question) -> None:
    name = sessions_pb2.SessionName(session_id=question.session_id, cache_salt=question.cache_salt)
    async with connected(access) as client:
        with named_failures(access.endpoint):
            stub = sessions_pb2_grpc.SessionsStub(client.channel)
            await stub.Delete(sessions_pb2.DeleteSessionRequest(name=name))


def _lines() -> Iterator[str]:
    """Non-empty lines of stdin; a terminal is asked for each."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 gives input() its line editing
    while True:
        try:
            line = input(PROMPT if sys.stdin.isatty() else "")
            line.encode()  # some locales let any byte through
        except EOFError:
            return
        except UnicodeError:
            raise RequestRefused("what came on stdin is not UTF-8") from None
        if line:
            yield line
