"""The router of the benchmark in a process of its own.

Run as `python -m cluster.bench_dispatch.router_process ADDRESS`, it says when it listens. Every
further line on stdin is a routing table as JSON, the addresses of each expert, or empty brackets
for the one in use; it answers with the CPU seconds that it has used.
"""

import asyncio
import json
import sys
import time

from services import rpc
from services.router.router import Router
from services.router.routing import RoutingTable
from services.router.server import router_service


async def _serve(address: str) -> None:
    router = Router("bench")
    server = await rpc.start_server([router_service(router)], address)
    print(server.address, flush=True)
    while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
        if table := json.loads(line):
            missing = await router.update(RoutingTable.of(router.table.epoch + 1, table))
            assert not missing, f"no replica answers at {missing}"
        print(time.process_time(), flush=True)
    await server.stop(grace_seconds=1.0)
    await router.close()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
