"""An expert replica in a process of its own, for tests that kill it: ADDRESS FIRST END."""

import asyncio
import sys

import torch

from tests.services.dispatch_plane import start_replica


async def main() -> None:
    address, first, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    _, server = await start_replica(address, range(first, end))
    print(server.address, flush=True)
    await server.wait_until_stopped()


if __name__ == "__main__":
    asyncio.run(main())
