"""Looks at the load of the experts all the time, and evens it out now and then where it is to.

Knows neither how the load is measured nor how experts are moved.
"""

import asyncio
import logging

from cluster.changes import Changes
from cluster.expert_balance import ExpertBalance
from cluster.members import DeploymentError

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


class RebalanceLoop:
    def __init__(
        self, balance: ExpertBalance, changes: Changes, rebalance_seconds: float | None
    ) -> None:
        """Without `rebalance_seconds` experts are moved by hand alone."""
        self._balance = balance
        self._changes = changes
        self._rebalance_seconds = rebalance_seconds

    async def run(self) -> None:
        """For as long as the deployment serves."""
        clock = asyncio.get_running_loop().time
        last = clock()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._balance.look()
            if self._rebalance_seconds is not None and clock() - last >= self._rebalance_seconds:
                await self._rebalance()
                last = clock()

    async def _rebalance(self) -> None:
        try:
            done = await self._changes.rebalance(dry_run=False)
        except DeploymentError as error:  # a replica died, say: there is a next time
            log.warning("not_rebalanced why=%s", error)
            return
        if done.moves:
            words = "rebalanced moves=%d balance=%.3f expected=%.3f"
            log.info(words, len(done.moves), done.balance_before, done.balance_after)
