"""A worker in a process of its own, for tests that kill, freeze or cut it off: ADDRESS read|save.

It saves block 0. Then it says `busy` in the middle of reading block 0, or of saving block 1, stays
there for a second, and says what it found in its memory: `same`, or `different` from before.
"""

import asyncio
import sys
import time

from services.kvstore.client import KvClient, SaveItem
from tests.services.kvstore.blobs import client_config, item_of, key_of

BUSY_SECONDS = 1.0


def _stay(view: memoryview) -> None:
    before = bytes(view)
    print("busy", flush=True)
    time.sleep(BUSY_SECONDS)
    print("same" if bytes(view) == before else "different", flush=True)


async def main() -> None:
    client = await KvClient.open(client_config(sys.argv[1]))
    async with asyncio.timeout(10):
        await client.wait_connected()
    await client.save([item_of(0)])
    if sys.argv[2] == "read":
        deadline_s = asyncio.get_running_loop().time() + 60
        async with client.acquire(
            [key_of(0)], deadline_s=deadline_s, consume=lambda _index, payload: _stay(payload)
        ) as blocks:
            await anext(blocks)
    else:
        item = item_of(1)

        def fill(view: memoryview) -> None:
            item.fill(view)
            _stay(view)

        slow = SaveItem(item.key, item.kind, item.start, item.end, item.nbytes, fill)
        await client.save([slow])
    await asyncio.to_thread(sys.stdin.readline)
    await client.close()


if __name__ == "__main__":
    asyncio.run(main())
