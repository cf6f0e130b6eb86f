"""All roles over real gRPC in one process: gateway, attention workers, routers, expert replicas."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from model1.kv_pool import KVPool
from model1.moe import ExpertBank
from protos import inference_pb2, inference_pb2_grpc
from services import rpc
from services.attention.engine import EngineConfig
from services.attention.experts import RoutedExperts
from services.attention.scheduler import SchedulerLimits
from services.attention.server import AttentionWorker, AttentionWorkerConfig
from services.expert.replica import ExpertReplica
from services.expert.server import expert_service
from services.gateway.server import GatewayConfig, GatewayServer
from services.gateway.topology import Topology
from services.gateway.worker import WorkerAddress
from services.router.router import Router
from services.router.routing import RoutingTable
from services.router.server import router_service
from tests.services import tiny_model
from tests.services.gateway.deployed import StagedOperations

NUM_EXPERTS = tiny_model.CONFIG.n_routed_experts
LIMITS = SchedulerLimits(max_batch_tokens=48, max_sequences=8, max_waiting=64)


def held_bank(expert_ids: range) -> ExpertBank:
    """The part of the tiny model's experts that one group holds."""
    bank = ExpertBank(tiny_model.CONFIG, expert_ids)
    whole = tiny_model.model().experts.state_dict()
    start, end = expert_ids.start, expert_ids.stop
    bank.load_state_dict({name: weight[start:end] for name, weight in whole.items()})
    return bank.requires_grad_(False)


async def open_worker(
    stack: AsyncExitStack, name: str, pool: KVPool, router_address: str
) -> AttentionWorker:
    experts = await RoutedExperts.open(router_address)
    stack.push_async_callback(experts.close)
    config = AttentionWorkerConfig(name=name, engine=EngineConfig(limits=LIMITS))
    worker = await AttentionWorker.open(tiny_model.model().trunk, pool, experts, config)
    stack.push_async_callback(worker.stop, 0)
    return worker


class Deployment:
    """What the tests reach into: the client's stub, and what they break."""

    def __init__(
        self, stub: Any, workers: list[AttentionWorker], replicas: list[rpc.RunningServer]
    ) -> None:
        self.stub = stub
        self.workers = workers
        self.replicas = replicas


@asynccontextmanager
async def deployed(
    directory: Path, *, num_workers: int, num_groups: int, num_replicas: int
) -> AsyncIterator[Deployment]:
    pools = [tiny_model.pool(max_sequences=8) for _ in range(num_workers)]
    size = NUM_EXPERTS // num_groups
    async with AsyncExitStack() as stack:
        replicas = []
        replicas_of_expert: list[list[str]] = []
        for group in range(num_groups):
            expert_ids = range(group * size, (group + 1) * size)
            servers = []
            for number in range(num_replicas):
                replica = ExpertReplica(f"expert-{group}-{number}", held_bank(expert_ids))
                server = await rpc.start_server([expert_service(replica)], "127.0.0.1:0")
                servers.append(await stack.enter_async_context(server))
            replicas += servers
            replicas_of_expert += [[server.address for server in servers]] * size
        router = Router("router-0", replica_wait_seconds=0.2)
        stack.push_async_callback(router.close)
        assert await router.update(RoutingTable.of(1, replicas_of_expert)) == ()
        listening = await rpc.start_server(
            [router_service(router)], f"unix:{directory}/router.sock"
        )
        await stack.enter_async_context(listening)
        workers = [
            await open_worker(stack, f"attention-{i}", pool, listening.address)
            for i, pool in enumerate(pools)
        ]

        async def topology() -> Topology:
            return Topology(1, ())

        config = GatewayConfig(
            model_dir=tiny_model.write_model_dir(directory),
            version="1",
            address="127.0.0.1:0",
            continue_patience_seconds=1.0,
        )
        gateway = await GatewayServer.open(config, topology, StagedOperations())
        stack.push_async_callback(gateway.stop, 0)
        await gateway.gateway.workers.update(
            [WorkerAddress(f"attention-{i}", worker.address) for i, worker in enumerate(workers)]
        )
        channel = await stack.enter_async_context(rpc.channel(gateway.address))
        yield Deployment(inference_pb2_grpc.InferenceStub(channel), workers, replicas)
    for worker, pool in zip(workers, pools, strict=True):
        worker.engine.check()
        assert pool.usage().sequences == 0


def request(num_prompt: int, max_tokens: int, **sampling: Any) -> inference_pb2.GenerateRequest:
    prompt = inference_pb2.TokenIds(ids=tiny_model.prompt(num_prompt))
    return inference_pb2.GenerateRequest(
        token_ids=prompt,
        sampling=inference_pb2.SamplingParams(**sampling),
        stopping=inference_pb2.StoppingParams(max_tokens=max_tokens),
    )


@pytest.mark.parametrize(
    ("num_workers", "num_groups", "num_replicas"), [(1, 1, 1), (2, 2, 1), (1, 4, 2)]
)
async def test_every_topology_gives_the_tokens_of_one_process(
    tmp_path: Path, num_workers: int, num_groups: int, num_replicas: int
) -> None:
    shapes = [(num_prompt, 4 + num_prompt % 5) for num_prompt in (1, 3, 7, 8, 9, 31, 64, 129, 140)]
    async with deployed(
        tmp_path, num_workers=num_workers, num_groups=num_groups, num_replicas=num_replicas
    ) as deployment:
        calls = [deployment.stub.Generate(request(*shape)) for shape in shapes]
        sampled = deployment.stub.Generate(request(20, 12, temperature=0.8, top_p=0.9, seed=3))
        answers = [await call for call in calls]
        drawn = await sampled
    for shape, answer in zip(shapes, answers, strict=True):
        expected = tiny_model.model().generate(tiny_model.prompt(shape[0]), shape[1])
        assert list(answer.token_ids) == expected, shape
    assert list(drawn.token_ids) == tiny_model.model().generate(
        tiny_model.prompt(20), 12, temperature=0.8, top_p=0.9, seed=3
    )
    assert {answer.worker for answer in answers} == {f"attention-{i}" for i in range(num_workers)}


async def test_experts_that_are_gone_end_their_requests_as_unavailable(tmp_path: Path) -> None:
    async with deployed(tmp_path, num_workers=1, num_groups=2, num_replicas=1) as deployment:
        call = deployment.stub.GenerateStream(request(5, 300))
        frames = aiter(call)
        for _ in range(3):
            await anext(frames)
        await deployment.replicas[1].stop(0)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in frames:
                pass
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "attention-0" in str(raised.value.details())


async def test_a_client_that_leaves_frees_kv_and_leaves_the_others_alone(tmp_path: Path) -> None:
    async with deployed(tmp_path, num_workers=1, num_groups=2, num_replicas=1) as deployment:
        staying = deployment.stub.Generate(request(9, 12))
        leaving = deployment.stub.GenerateStream(request(5, 300))
        frames = aiter(leaving)
        for _ in range(3):
            await anext(frames)
        leaving.cancel()
        answer = await staying
        engine = deployment.workers[0].engine
        async with asyncio.timeout(30):
            while engine.stats().running_sequences:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert engine.stats().counters.cancelled == 1
    assert list(answer.token_ids) == tiny_model.model().generate(tiny_model.prompt(9), 12)
