"""GET /metrics over HTTP, on the gateway's own loop.

Every request asks anew, and is made into text in a thread: that blocks nobody's tokens.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from services.gateway.metrics import Report
from services.rpc import AddressUnavailable

log = logging.getLogger(__name__)

PATH = "/metrics"
# For a scrape that is under way when the server is told to stop.
HANDLERS_GRACE_S = 1.0

Ask: TypeAlias = Callable[[], Awaitable[Report]]


class MetricsServer:
    """A listening server; `url` is where the metrics are."""

    def __init__(self, runner: web.AppRunner, url: str) -> None:
        self.url = url
        self._runner = runner

    @classmethod
    async def open(cls, host: str, port: int, ask: Ask) -> "MetricsServer":
        """Listen; port 0 is any free one. Raises AddressUnavailable."""

        async def metrics(request: web.Request) -> web.Response:
            registry = CollectorRegistry()
            registry.register(await ask())
            encode, content_type = choose_encoder(request.headers.get("Accept", ""))
            text = await asyncio.to_thread(encode, registry)
            return web.Response(body=text, headers={"Content-Type": content_type})

        app = web.Application()
        app.router.add_get(PATH, metrics)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=HANDLERS_GRACE_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            await runner.cleanup()
            raise AddressUnavailable(
                f"cannot listen on {_authority(host, port)} for metrics: {error.strerror}"
            ) from error
        url = f"http://{_authority(host, runner.addresses[0][1])}{PATH}"
        log.info("metrics_listening url=%s", url)
        return cls(runner, url)

    async def stop(self) -> None:
        await self._runner.cleanup()


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
