"""What our part of a layer crossing adds to gRPC's: a crossing with replicas that compute nothing,
against the same bytes over the same four hops with nothing done to them.
"""

import tempfile
import time
from dataclasses import dataclass

import numpy as np

from cluster.bench_dispatch.rig import Rig, breathe
from cluster.bench_echo import HopBytes, echo
from model1.bench import random_call
from model1.moe import ExpertCall
from services import wire
from services.attention.experts import RoutedExperts, layer_rows
from services.attention.stats import Percentiles
from services.router.pairs import gather
from services.router.routing import Load, RoutingTable

HOPS = 4  # worker -> router -> replicas -> router -> worker
WARM_UP_TRIPS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class HopCost:
    """In seconds, of all four hops. `added` is what a crossing takes on top of the chain."""

    num_rows: int
    num_replicas: int
    num_bytes: int  # of all messages of a crossing
    num_trips: int
    crossing: Percentiles
    chain: Percentiles

    @property
    def ratio(self) -> float:
        return self.crossing.p50 / self.chain.p50

    @property
    def added_seconds_a_hop(self) -> float:
        return (self.crossing.p50 - self.chain.p50) / HOPS


async def measure_hop(rig: Rig, num_rows: int, *, rounds: int, trips: int) -> HopCost:
    table = rig.halved(rig.emulated_addresses)
    await rig.use_emulated(table, float("inf"))
    call = random_call(rig.config, num_rows)
    hops = _hop_bytes(call, RoutingTable.of(1, table))
    crossings: list[float] = []
    chained: list[float] = []
    experts = await RoutedExperts.open(rig.router_address)
    try:
        with tempfile.TemporaryDirectory(prefix="model1-") as folder:
            async with echo(f"unix:{folder}/echo.sock", hops) as chain:
                await _crossings(experts, call, WARM_UP_TRIPS)
                await chain.round_trips(WARM_UP_TRIPS)
                for _ in range(rounds):
                    await breathe()
                    crossings += await _crossings(experts, call, trips)
                    await breathe()
                    chained += await chain.round_trips(trips)
    finally:
        await experts.close()
    return HopCost(
        num_rows=num_rows,
        num_replicas=len(hops.parts),
        num_bytes=hops.request + sum(hops.parts) + sum(hops.part_replies) + hops.reply,
        num_trips=len(crossings),
        crossing=Percentiles.of(crossings),
        chain=Percentiles.of(chained),
    )


async def _crossings(experts: RoutedExperts, call: ExpertCall, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        await (await experts.submit(call))
        seconds.append(time.perf_counter() - start)
    return seconds


def _hop_bytes(call: ExpertCall, table: RoutingTable) -> HopBytes:
    """What the router really sends."""
    asked = layer_rows(call)
    loads = {address: Load(0, 0) for address in table.replicas}
    shares = table.split(asked.expert_ids.reshape(-1), loads).shares
    parts = [gather(asked, share.positions) for share in shares]
    hidden_size = call.rows.shape[1]
    outputs = [
        wire.encode_expert_outputs(1, np.zeros((len(part.row_index), hidden_size), np.uint16))
        for part in parts
    ]
    sums = np.zeros(call.rows.shape, dtype=np.float32)
    return HopBytes(
        request=wire.encode_layer_rows(1, asked, 1.0).ByteSize(),
        parts=tuple(wire.encode_expert_rows(1, part, 1.0).ByteSize() for part in parts),
        part_replies=tuple(output.ByteSize() for output in outputs),
        reply=wire.encode_layer_sums(1, sums).ByteSize(),
    )
