"""Which routing tables still have pairs out, and when an old one has none left.

Knows numbers of epochs alone.
"""

import asyncio
from collections import Counter


class TablesOut:
    """Counts what was sent under each epoch and is still waited for."""

    def __init__(self) -> None:
        self._num_out: Counter[int] = Counter()
        self._changed = asyncio.Event()

    def sent(self, epoch: int) -> None:
        self._num_out[epoch] += 1

    def ended(self, epoch: int) -> None:
        self._num_out[epoch] -= 1
        if not self._num_out[epoch]:
            del self._num_out[epoch]
            self._changed.set()

    async def wait_retired(self, epoch: int) -> None:
        """Until nothing is out that was sent before this epoch."""
        while any(older < epoch for older in self._num_out):
            self._changed.clear()
            await self._changed.wait()
