"""Owns both ends of a long-lived bidirectional stream: `Duplex` connects, writes, reads, and
connects again with a bounded backoff after a break; `answer` is its peer in a server.

Knows nothing of what the messages mean, nor which of them still wait for an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

import grpc
import grpc.aio

from services import rpc

FIRST_BACKOFF_SECONDS = 0.02
MAX_BACKOFF_SECONDS = 2.0

Request = TypeVar("Request")
Response = TypeVar("Response")


class Duplex(Generic[Request, Response]):
    """`receive` is called with each message; `broken` with a reason when the stream ends without
    being asked to: nothing sent before will be answered any more."""

    def __init__(
        self,
        address: str,
        open_stream: Callable[[grpc.aio.Channel], grpc.aio.StreamStreamCall[Request, Response]],
        *,
        receive: Callable[[Response], None],
        broken: Callable[[str], None],
    ) -> None:
        self.address = address
        self._open_stream = open_stream
        self._receive = receive
        self._broken = broken
        self._outbox: asyncio.Queue[Request] = asyncio.Queue()
        self._connected = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"duplex {address}")

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    async def wait_connected(self) -> None:
        await self._connected.wait()

    def send(self, message: Request) -> None:
        """Queue a message; call it only while connected. The queue is as long as the sender lets
        it: both senders bound the calls that they have under way."""
        self._outbox.put_nowait(message)

    @property
    def closed(self) -> bool:
        return self._task.done()

    def cancel(self) -> None:
        """Close soon, without waiting for it."""
        self._connected.clear()
        self._task.cancel()

    async def close(self) -> None:
        self.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        backoff_seconds = FIRST_BACKOFF_SECONDS
        async with rpc.channel(self.address) as channel:
            while True:
                stream = self._open_stream(channel)
                try:
                    await stream.wait_for_connection()
                    backoff_seconds = FIRST_BACKOFF_SECONDS
                    self._connected.set()
                    reason = await self._converse(stream)
                    self._connected.clear()
                    # What was still queued would otherwise reach the peer's successor.
                    self._outbox = asyncio.Queue()
                    self._broken(reason)
                except grpc.aio.AioRpcError:
                    pass  # never connected: nobody waits for an answer, the next try is below
                finally:
                    stream.cancel()
                # Half of it at random, so that a thousand peers do not come back at once.
                await asyncio.sleep(backoff_seconds * random.uniform(0.5, 1.0))
                backoff_seconds = min(2 * backoff_seconds, MAX_BACKOFF_SECONDS)

    async def _converse(self, stream: grpc.aio.StreamStreamCall[Request, Response]) -> str:
        """Until the stream ends; returns why it did."""
        writing = asyncio.create_task(rpc.pump(self._outbox, stream.write))
        try:
            async for message in stream:
                self._receive(message)
            return "the peer ended the stream"
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        finally:
            writing.cancel()
            # A broken stream fails the write as well; the read has told why.
            await asyncio.wait([writing])


async def answer(
    requests: AsyncIterator[Request],
    context: grpc.aio.ServicerContext[Request, Response],
    outbox: asyncio.Queue[Response],
    *,
    receive: Callable[[Request], None],
    settled: Callable[[], Awaitable[object]],
    draining: asyncio.Event,
) -> None:
    """Call `receive` with each request and write what is put into `outbox`.

    When the client has no more to ask, or at a drain, waits for `settled()`, writes the rest and
    returns, which ends the stream. Requests that a drain leaves unread are the client's to repeat.
    """
    # Without it the client learns only from the first answer that the stream is open.
    await context.send_initial_metadata(())

    async def read() -> None:
        async for message in requests:
            receive(message)

    async with asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(rpc.pump(outbox, context.write))
        reading = tasks.create_task(read())
        drain = tasks.create_task(draining.wait())
        await asyncio.wait((reading, drain), return_when=asyncio.FIRST_COMPLETED)
        reading.cancel()
        drain.cancel()
        await settled()
        await outbox.join()
        writing.cancel()
