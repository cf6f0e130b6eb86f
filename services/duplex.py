"""Owns both ends of a long-lived bidirectional stream: `Duplex` connects, writes, reads, and
connects again with a bounded backoff after a break; `answer` is its peer in a server.

Knows nothing of what the messages mean, nor which of them still wait for an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import grpc
import grpc.aio

from services import rpc
from services.tls import Tls

log = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.02
MAX_BACKOFF_SECONDS = 2.0
# A server reads no further while its peer leaves this many answers unread.
MAX_UNWRITTEN_ANSWERS = 64
# Several times what any sender has under way. Calls that were given up stay in the queue of a peer
# that reads nothing, so the senders' own bounds do not bound it.
MAX_UNSENT_MESSAGES = 1024
# In the initial metadata of every stream: the server's clock, which deadlines may refer to.
CLOCK_KEY = "model1-clock-seconds"

Request = TypeVar("Request")
Response = TypeVar("Response")
Message = TypeVar("Message")


class Duplex(Generic[Request, Response]):
    """`opened` is called with the initial metadata of every new stream, `receive` with each
    message, and `broken` with a reason when the stream ends without being asked to: nothing sent
    before will be answered any more. A message that the first two cannot take ends the stream."""

    def __init__(
        self,
        address: str,
        open_stream: Callable[[grpc.aio.Channel], grpc.aio.StreamStreamCall[Request, Response]],
        *,
        opened: Callable[[grpc.aio.Metadata], None] = lambda _metadata: None,
        receive: Callable[[Response], None],
        broken: Callable[[str], None],
        tls: Tls | None = None,
    ) -> None:
        self.address = address
        self._tls = tls
        self._open_stream = open_stream
        self._opened = opened
        self._receive = receive
        self._broken = broken
        self._outbox: asyncio.Queue[Request] = asyncio.Queue()
        self._connected = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"duplex {address}")

    @property
    def connected(self) -> bool:
        """A peer that has stopped reading counts as gone."""
        return self._connected.is_set() and not self.choked

    @property
    def choked(self) -> bool:
        """The stream is open, and its peer has left too much unread."""
        return self._connected.is_set() and self._outbox.qsize() >= MAX_UNSENT_MESSAGES

    @property
    def closed(self) -> bool:
        return self._task.done()

    async def wait_connected(self) -> None:
        await self._connected.wait()

    def send(self, message: Request) -> None:
        """Queue a message; call it only while connected, or in `opened`.

        When nothing else waits, one `await asyncio.sleep(0)` later the bytes are in gRPC's hands.
        """
        self._outbox.put_nowait(message)

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
        async with rpc.channel(self.address, self._tls) as channel:
            while True:
                stream = self._open_stream(channel)
                try:
                    await stream.wait_for_connection()
                    metadata = await stream.initial_metadata()
                    # What was left in the last one was meant for a peer that is gone.
                    self._outbox = asyncio.Queue()
                    self._opened(metadata)  # may send the first messages
                    backoff_seconds = FIRST_BACKOFF_SECONDS
                    self._connected.set()
                    reason = await self._converse(stream)
                    self._connected.clear()
                    self._broken(reason)
                except grpc.aio.AioRpcError:
                    pass  # never connected: nobody waits for an answer, the next try is below
                except Exception:  # of `opened`: somebody else listens there, or a bug
                    log.exception("stream_refused peer=%s", self.address)
                finally:
                    stream.cancel()
                # Half of it at random, so that a thousand peers do not come back at once.
                await asyncio.sleep(backoff_seconds * random.uniform(0.5, 1.0))
                backoff_seconds = min(2 * backoff_seconds, MAX_BACKOFF_SECONDS)

    async def _converse(self, stream: grpc.aio.StreamStreamCall[Request, Response]) -> str:
        """Until the stream ends; returns why it did."""
        writing = asyncio.create_task(_pump(self._outbox, stream.write))
        try:
            async for message in stream:
                self._receive(message)
            return "the peer ended the stream"
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        except Exception as error:  # of `receive`: without the rim no call would ever end again
            log.exception("message_not_understood peer=%s", self.address)
            return f"a message could not be taken: {type(error).__name__}: {error}"
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
    metadata: Sequence[tuple[str, str | bytes]] = (),
) -> None:
    """Call `receive` with each request and write what is put into `outbox`.

    When the client has no more to ask, or at a drain, waits for `settled()`, writes the rest and
    returns, which ends the stream. Requests that a drain leaves unread are the client's to repeat.
    """
    clock_seconds = asyncio.get_running_loop().time()
    # Sent at once: it is what tells the client that the stream is open.
    await context.send_initial_metadata(((CLOCK_KEY, str(clock_seconds)), *metadata))

    async def read() -> None:
        async for message in requests:
            receive(message)
            if outbox.qsize() >= MAX_UNWRITTEN_ANSWERS:
                await outbox.join()

    async with asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(_pump(outbox, context.write))
        reading = tasks.create_task(read())
        drain = tasks.create_task(draining.wait())
        await asyncio.wait((reading, drain), return_when=asyncio.FIRST_COMPLETED)
        reading.cancel()
        drain.cancel()
        await settled()
        await outbox.join()
        writing.cancel()


async def _pump(
    outbox: asyncio.Queue[Message], write: Callable[[Message], Awaitable[None]]
) -> None:
    """Write what is put into `outbox`, in order: gRPC allows one write at a time on a stream."""
    while True:
        message = await outbox.get()
        await write(message)
        outbox.task_done()
