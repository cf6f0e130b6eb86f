"""A worker in a process of its own, for tests that kill or freeze it while it reads and writes:
ADDRESS. Prints one line when it holds a read lease and is in the middle of filling a block; the
block is filled slowly, and at the end of it the worker tells what it read before and after.
"""

import asyncio
import sys
import time

from services.kvstore.client import KvClient, SaveItem
from tests.services.kvstore.blobs import client_config, item_of, key_of

FILL_SECONDS = 1.0


async def main() -> None:
    client = await KvClient.open(client_config(sys.argv[1]))
    async with asyncio.timeout(10):
        await client.wait_connected()
    await client.save([item_of(0)])
    loop = asyncio.get_running_loop()
    async with client.acquire([key_of(0)], deadline_s=loop.time() + 10) as blocks:
        block = await anext(blocks)
        assert block.payload is not None
        before = bytes(block.payload)
        item = item_of(1)

        def fill(view: memoryview) -> None:
            print("filling", flush=True)
            half = len(view) // 2
            whole = bytearray(len(view))
            item.fill(memoryview(whole))
            view[:half] = whole[:half]
            time.sleep(FILL_SECONDS)
            view[half:] = whole[half:]

        slow = SaveItem(item.key, item.kind, item.start, item.end, item.nbytes, fill)
        saved = await client.save([slow])
        print("same" if bytes(block.payload) == before else "different", *saved, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await client.close()


if __name__ == "__main__":
    asyncio.run(main())
