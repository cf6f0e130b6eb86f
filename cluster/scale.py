"""`model1 scale` and `model1 drain`: how many actors of a kind a running deployment has, and
which experts each of them holds."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from cluster.access import Access
from cluster.client import Client, Interrupted, Unreachable, connected, named_failures
from cluster.output import text_table
from cluster.plain import as_json
from cluster.status import member_table
from protos import control_pb2, control_pb2_grpc

ASK_AGAIN_SECONDS = 0.5
_MOVE_WORDS = {
    control_pb2.EXPERT_MOVE_KIND_LOAD: "loads",
    control_pb2.EXPERT_MOVE_KIND_DROP: "drops",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleCommand:
    """One change, asked of one gateway; returns when it is live, however long that
    takes. Prints what came and went, and who is there now."""

    access: Access
    as_json: bool

    async def experts(self, num_replicas: int, group: int | None) -> None:
        wanted = control_pb2.ScaleExperts(replicas=num_replicas, group=group)
        await self._scale(control_pb2.ScaleRequest(experts=wanted))

    async def attention(self, num_workers: int) -> None:
        wanted = control_pb2.ScaleAttention(replicas=num_workers)
        await self._scale(control_pb2.ScaleRequest(attention=wanted))

    async def drain(self, name: str) -> None:
        async with self._client() as client:
            change = await _control(client).Drain(control_pb2.DrainRequest(actor=name))
            await self._print(client, change, removed=change.removed)

    async def drain_node(self, node: str, patience_seconds: float) -> None:
        """The gateway that is asked may be on that node and drain itself: whoever answers at the
        endpoint then is asked again, and says so when nothing is left there."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + patience_seconds
        while True:
            try:
                async with self._client() as client:
                    request = control_pb2.DrainRequest(node=node)
                    change = await _control(client).Drain(request)
                    await self._print(client, change, added=change.added, removed=change.removed)
                return
            except (Unreachable, Interrupted):
                if clock() > deadline:
                    raise
                await asyncio.sleep(ASK_AGAIN_SECONDS)

    async def rebalance(self, *, dry_run: bool) -> None:
        async with self._client() as client:
            request = control_pb2.RebalanceRequest(dry_run=dry_run)
            done: control_pb2.RebalanceResponse = await _control(client).Rebalance(request)
        if self.as_json:
            print(as_json(done))
            return
        rows = [(move.replica, _MOVE_WORDS[move.kind], move.expert) for move in done.moves]
        if rows:
            print(text_table(("replica", "move", "expert"), rows))
        made = "planned" if dry_run else "made"
        balances = f"balance {done.balance_before:.3f} before, {done.balance_after:.3f} after"
        print(f"{len(rows) or 'no'} moves {made}; {balances}; routing epoch {done.epoch}")

    async def _scale(self, request: control_pb2.ScaleRequest) -> None:
        async with self._client() as client:
            change = await _control(client).Scale(request)
            await self._print(client, change, added=change.added, removed=change.removed)

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[Client]:
        async with connected(self.access) as client:
            with named_failures(self.access.endpoint):
                yield client

    async def _print(
        self,
        client: Client,
        change: control_pb2.ScaleResponse | control_pb2.DrainResponse,
        *,
        added: Sequence[str] = (),
        removed: Sequence[str] = (),
    ) -> None:
        if self.as_json:
            print(as_json(change))
            return
        both = (("added", added), ("removed", removed))
        words = [f"{what} {', '.join(names)}" for what, names in both if names]
        print(f"{'; '.join(words) or 'nothing to change'}; routing epoch {change.epoch}")
        print(member_table((await client.topology()).members))


def _control(client: Client) -> Any:
    return control_pb2_grpc.ControlStub(client.channel)
