"""A whole deployment in this process: the supervisor drives the real roles, without Ray."""

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import pytest

from cluster.access import Access
from cluster.client import End, Piece, Question, Unreachable, connected
from cluster.config import AttentionSettings, KvSettings, Settings, load_settings
from cluster.expert_moves import Move, MoveKind
from cluster.local import ask_here
from cluster.members import Change, DeploymentError, Listening, Peers, Process, Rebalance, Snapshot
from cluster.roles import Place, Serve, Serving, engine_config, load_role
from cluster.supervisor import Supervisor
from cluster.topology import ActorSpec, Role, Room, plan_topology
from model1.errors import ConfigError
from model1.kv_layout import KVFormat
from protos.control_pb2 import RoleStats
from services.attention import warm_up
from services.attention.kv_cache import KvCacheConfig
from services.generation import KvUsage
from services.histogram import Histogram, added
from services.rpc import AddressUnavailable
from tests.services import tiny_model
from tests.services.gateway.scraped import scraped

PROMPT = tiny_model.prompt(20)


class RoleHere:
    """An actor whose process is this one."""

    def __init__(self, spec: ActorSpec, settings: Settings, runtime_dir: Path) -> None:
        self._spec = spec
        self._settings = settings
        self._place = Place("127.0.0.1", runtime_dir)
        self._serve: Serve
        self._serving: Serving

    async def placed(self) -> Process:
        return Process(os.getpid(), "here")

    async def load(self, *, gently: bool = False) -> None:
        self._serve = load_role(self._spec, self._settings, place=self._place, supervisor=Nobody())

    async def serve(self, peers: Peers) -> Listening:
        self._serving = await self._serve(peers)
        return self._serving.listening

    async def update(self, peers: Peers) -> None:
        await self._serving.update(peers)

    async def stats(self) -> RoleStats:
        return self._serving.report()

    async def hold(self, experts: Sequence[int]) -> None:
        await self._serving.hold(experts)

    async def retired(self, epoch: int) -> None:
        await self._serving.retired(epoch)

    async def stop(self, grace_seconds: float) -> None:
        await self._serving.stop(grace_seconds)

    async def ended(self) -> str:
        await asyncio.Event().wait()
        raise AssertionError("this process goes on")

    def kill(self) -> None:
        pass


class Nobody:
    """The supervisor, where nobody is to ask for it."""

    async def snapshot(self) -> Snapshot:
        raise AssertionError("nobody asks for the topology here")

    async def scale_experts(self, num_replicas: int, group: int | None) -> Change:
        raise AssertionError("nobody scales here")

    async def scale_attention(self, num_workers: int) -> Change:
        raise AssertionError("nobody scales here")

    async def drain(self, name: str) -> Change:
        raise AssertionError("nobody drains here")

    async def drain_node(self, node: str) -> Change:
        raise AssertionError("nobody drains here")

    async def rebalance(self, dry_run: bool) -> Rebalance:
        raise AssertionError("nobody moves experts here")


class OneMachine:
    async def rooms(self) -> tuple[Room, ...]:
        return (Room(),)

    def lose(self, node: int) -> None:
        raise AssertionError(f"node {node} is this one")

    async def wait_for_slots(self, role: Role, num_slots: int) -> None:
        raise AssertionError("there is room for everybody")

    async def close(self, node: str) -> frozenset[int]:
        raise AssertionError("nobody drains here")


@pytest.fixture
def settings(tiny_checkpoint: Path) -> Settings:
    flags = {"model.path": tiny_checkpoint, "gateway.port": 0, "topology.attention_workers": 2}
    return load_settings(environment={}, flags=flags)


@asynccontextmanager
async def deployed_here(settings: Settings, folder: Path) -> AsyncIterator[tuple[str, Supervisor]]:
    topology = plan_topology(settings.topology, num_experts=4)
    supervisor = Supervisor(
        topology,
        lambda spec: RoleHere(spec, settings, folder),
        Process(os.getpid(), "here"),
        OneMachine(),
    )
    endpoint = await supervisor.start()
    try:
        yield endpoint, supervisor
    finally:
        await supervisor.stop(grace_seconds=5)


@pytest.fixture
def socket_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")  # the path of a Unix socket must be short


async def test_the_roles_together_answer_like_the_model(
    settings: Settings, socket_folder: Path
) -> None:
    expected = tiny_model.model().generate(PROMPT, max_tokens=9)
    async with deployed_here(settings, socket_folder) as (endpoint, supervisor):
        async with connected(Access(endpoint)) as client:
            frames = [frame async for frame in client.ask(Question(prompt=PROMPT, max_tokens=9))]
        members = (await supervisor.snapshot()).members
    token_ids = [token for f in frames[:-1] if isinstance(f, Piece) for token in f.token_ids]
    assert token_ids == expected
    usage = KvUsage(computed_tokens=len(PROMPT))
    assert frames[-1] == End("length", len(PROMPT), len(expected), usage)
    counts = {role: sum(m.stats.requests for m in members if m.spec.role is role) for role in Role}
    assert counts[Role.GATEWAY] == counts[Role.ATTENTION] == 1
    # The first one computes the prompt; and each of two workers has measured itself before.
    num_steps = len(expected) + 2 * warm_up.NUM_STEPS
    assert counts[Role.ROUTER] == num_steps * tiny_model.CONFIG.num_hidden_layers
    assert counts[Role.EXPERT] >= counts[Role.ROUTER]


async def test_each_role_reports_what_it_counted_and_how_long_that_took(
    settings: Settings, socket_folder: Path
) -> None:
    async with (
        deployed_here(settings, socket_folder) as (at, supervisor),
        connected(Access(at)) as client,
    ):
        [_ async for _ in client.ask(Question(prompt=PROMPT, max_tokens=9))]
        members = (await supervisor.snapshot()).members
    # Of each role one that had something to do; of workers and routers that is one of two.
    busiest = sorted(members, key=lambda member: member.stats.requests)
    reports = {member.spec.role.value: member.stats for member in busiest}
    assert all(reports[role].seconds > 0 for role in Role)
    gateway, worker = reports["gateway"].gateway, reports["attention"].attention
    router, expert = reports["router"].router, reports["expert"].expert
    assert (gateway.received_requests, gateway.finished_requests) == (1, 1)
    assert gateway.generated_tokens == worker.completion_tokens == 9
    for once in (gateway.first_token_seconds, worker.first_token_seconds, worker.queue_seconds):
        assert Histogram.from_wire(once).count == 1
    assert 0 < worker.filled_seconds < worker.step_seconds.sum_seconds
    crossings = Histogram.from_wire(worker.crossing_seconds)
    assert crossings.count == worker.layer_crossings
    assert worker.crossing_wait_seconds.sum_seconds < crossings.sum_seconds
    answers = added([Histogram.from_wire(link.answer_seconds) for link in router.replicas])
    assert answers.count == sum(link.calls for link in router.replicas) >= router.calls
    assert sum(router.expert_pairs) == sum(link.pairs for link in router.replicas)
    assert 0 < expert.compute_seconds.sum_seconds < expert.busy_seconds < reports["expert"].seconds


async def test_the_context_on_offer_is_what_a_worker_can_hold(
    tiny_checkpoint: Path, socket_folder: Path
) -> None:
    flags = {"model.path": tiny_checkpoint, "gateway.port": 0, "attention.kv_tokens": 40}
    settings = load_settings(environment={}, flags=flags)
    async with deployed_here(settings, socket_folder) as (at, _), connected(Access(at)) as client:
        offered = (await client.model_info()).max_context_length
        frames = [frame async for frame in client.ask(Question(prompt=PROMPT))]
    assert offered == 40
    assert isinstance(frames[-1], End)
    assert len(PROMPT) + frames[-1].completion_tokens <= 40


async def test_a_budget_of_bytes_says_how_many_tokens_a_worker_holds(
    tiny_checkpoint: Path, socket_folder: Path
) -> None:
    flags = {
        "model.path": tiny_checkpoint,
        "gateway.port": 0,
        "attention.kv_bytes": 2**21,
        "attention.hot_entries": 64,
        "attention.max_sequences": 2,
    }
    settings = load_settings(environment={}, flags=flags)
    expected = tiny_model.model().generate(PROMPT, max_tokens=9)
    async with deployed_here(settings, socket_folder) as (at, _), connected(Access(at)) as client:
        offered = (await client.model_info()).max_context_length
        frames = [frame async for frame in client.ask(Question(prompt=PROMPT, max_tokens=9))]
    assert 0 < offered <= tiny_model.CONTEXT
    assert [t for f in frames if isinstance(f, Piece) for t in f.token_ids] == expected
    too_few = settings.model_copy(
        update={"attention": settings.attention.model_copy(update={"kv_bytes": 1000})}
    )
    with pytest.raises(ConfigError, match="not 1000"):
        async with deployed_here(too_few, socket_folder):
            pass


async def test_metrics_are_where_the_settings_say(settings: Settings, socket_folder: Path) -> None:
    gateway = settings.gateway.model_copy(update={"metrics_port": 0, "metrics_host": "127.0.0.2"})
    settings = settings.model_copy(update={"gateway": gateway})
    async with deployed_here(settings, socket_folder) as (at, _), connected(Access(at)) as client:
        url = (await client.server_info()).metrics_url
        assert url.startswith("http://127.0.0.2:")
        metrics = await asyncio.to_thread(scraped, url)
    assert metrics("model1_up", role="attention", name="attention-1") == 1
    # Nobody tells the topology here, and the rest is told nevertheless.
    assert metrics("model1_up", role="supervisor", name="supervisor") == 0


async def test_only_the_owner_may_open_the_routers_socket(
    settings: Settings, socket_folder: Path
) -> None:
    async with deployed_here(settings, socket_folder):
        names = os.listdir(socket_folder)
        for name in names:
            assert stat.S_IMODE(os.stat(socket_folder / name).st_mode) == 0o700
        assert any(name.startswith("router-") for name in names)
    assert os.listdir(socket_folder) == []


async def test_a_taken_port_is_told_by_the_gateway(settings: Settings, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        busy = settings.gateway.model_copy(update={"port": port})
        gateway = RoleHere(
            ActorSpec("gateway-0", Role.GATEWAY, 0),
            settings.model_copy(update={"gateway": busy}),
            tmp_path,
        )
        await gateway.load()
        with pytest.raises(AddressUnavailable, match=str(port)):
            await gateway.serve(Peers())


def test_every_setting_of_a_workers_kv_cache_is_that_of_the_settings() -> None:
    names = [field.name for field in fields(KvCacheConfig)]
    values = {name: 2**20 + number for number, name in enumerate(names)}
    engine = engine_config(AttentionSettings(), KvSettings.model_validate(values))
    assert asdict(engine.kv) == values


async def test_answering_locally_is_the_same_answer(settings: Settings) -> None:
    expected = tiny_model.model().generate(PROMPT, max_tokens=9)
    frames = [frame async for frame in ask_here(settings, Question(prompt=PROMPT, max_tokens=9))]
    token_ids = [token for f in frames if isinstance(f, Piece) for token in f.token_ids]
    assert token_ids == expected
    assert frames[-1] == End("length", len(PROMPT), len(expected))


async def test_a_gateway_that_has_gone_is_unreachable() -> None:
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9"):
        async with connected(Access("127.0.0.1:9")):
            pass


async def test_entries_in_host_memory_give_the_same_tokens(
    settings: Settings, socket_folder: Path
) -> None:
    prompt = tiny_model.prompt(50)
    expected = tiny_model.model().generate(prompt, max_tokens=40)
    attention = settings.attention.model_copy(update={"hot_entries": 64})
    settings = settings.model_copy(update={"attention": attention})
    async with deployed_here(settings, socket_folder) as (at, _), connected(Access(at)) as client:
        frames = [f async for f in client.ask(Question(prompt=prompt, max_tokens=40))]
    assert [token for f in frames if isinstance(f, Piece) for token in f.token_ids] == expected


@pytest.mark.slow
async def test_fp8_kv_gives_the_same_tokens_here_and_deployed(
    settings: Settings, socket_folder: Path
) -> None:
    prompt, model = tiny_model.prompt(50), tiny_model.model()
    expected = model.generate(prompt, max_tokens=40, kv_format=KVFormat.FP8)
    assert expected != model.generate(prompt, max_tokens=40)  # or this would show nothing
    question = Question(prompt=prompt, max_tokens=40)
    attention = settings.attention.model_copy(update={"kv_format": "fp8"})
    settings = settings.model_copy(update={"attention": attention})
    async with deployed_here(settings, socket_folder) as (at, _), connected(Access(at)) as client:
        deployed = [frame async for frame in client.ask(question)]
    here = [frame async for frame in ask_here(settings, question)]
    for frames in (deployed, here):
        assert [token for f in frames if isinstance(f, Piece) for token in f.token_ids] == expected


async def test_a_deployment_scales_while_a_stream_runs(
    settings: Settings, socket_folder: Path
) -> None:
    expected = tiny_model.model().generate(PROMPT, max_tokens=60)
    async with (
        deployed_here(settings, socket_folder) as (at, supervisor),
        connected(Access(at)) as client,
    ):
        frames = aiter(client.ask(Question(prompt=PROMPT, max_tokens=60)))
        first = await anext(frames)
        grown = await supervisor.changes.scale_experts(3, None)
        shrunk = await supervisor.changes.scale_experts(1, None)
        tokens = [
            t
            for f in (first, *[f async for f in frames])
            if isinstance(f, Piece)
            for t in f.token_ids
        ]
        assert (len(grown.added), len(shrunk.removed)) == (4, 4)
        assert tokens == expected
        assert (await supervisor.changes.drain("attention-0")).removed == ("attention-0",)
        again = [frame async for frame in client.ask(Question(prompt=PROMPT, max_tokens=60))]
    assert [t for f in again if isinstance(f, Piece) for t in f.token_ids] == expected


async def test_experts_move_while_a_stream_runs(settings: Settings, socket_folder: Path) -> None:
    expected = tiny_model.model().generate(PROMPT, max_tokens=60)
    load, drop = (partial(Move, kind) for kind in (MoveKind.LOAD, MoveKind.DROP))
    there = [load("expert-1-0", 0), load("expert-0-0", 3), drop("expert-0-0", 0)]
    there += [drop("expert-1-0", 3)]
    back = [Move(MoveKind.DROP, load.replica, load.expert) for load in there[:2]]
    back = [load("expert-0-0", 0), load("expert-1-0", 3), *back]
    async with (
        deployed_here(settings, socket_folder) as (at, supervisor),
        connected(Access(at)) as client,
    ):
        frames = aiter(client.ask(Question(prompt=PROMPT, max_tokens=60)))
        first = await anext(frames)
        for moves, held in ((there, [(1, 3), (0, 2)]), (back, [(0, 1), (2, 3)])) * 3:
            await supervisor.changes.shift.carry_out(moves)
            members = (await supervisor.snapshot()).members
            replicas = [member for member in members if member.spec.role is Role.EXPERT]
            assert [member.spec.experts for member in replicas] == held
            assert [tuple(member.stats.expert.expert_ids) for member in replicas] == held
        tokens = [
            t
            for f in (first, *[f async for f in frames])
            if isinstance(f, Piece)
            for t in f.token_ids
        ]
    assert tokens == expected


async def test_a_router_comes_back_where_it_was(
    settings: Settings, socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.roles.UPDATE_CONNECT_TIMEOUT_SECONDS", 0.2)
    spec = ActorSpec("router-0", Role.ROUTER, 0)
    expert = RoleHere(
        ActorSpec("expert-0-0", Role.EXPERT, 0, experts=(0, 1, 2, 3)), settings, socket_folder
    )
    await expert.load()
    replica = (await expert.serve(Peers())).address
    nobody = "127.0.0.1:9"  # a replica that died as well, and is not known to be gone yet
    first, second = RoleHere(spec, settings, socket_folder), RoleHere(spec, settings, socket_folder)
    for router in (first, second):
        await router.load()
    address = (await first.serve(Peers(((replica,),) * 4, epoch=1))).address
    await first.stop(0)
    peers = Peers(((replica, nobody),) * 4, epoch=2, last_address=address)
    assert (await second.serve(peers)).address == address
    folder = Path(address.removeprefix("unix:")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    await second.update(Peers(((replica,),) * 4, epoch=3))
    await second.update(Peers(((nobody,),) * 4, epoch=2))  # overtaken
    await second.stop(0)
    await expert.stop(0)


async def test_a_router_does_not_listen_where_others_may_enter(
    settings: Settings, socket_folder: Path
) -> None:
    folder = socket_folder / "router-open"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    router = RoleHere(ActorSpec("router-0", Role.ROUTER, 0), settings, socket_folder)
    await router.load()
    with pytest.raises(DeploymentError, match="router-open is not a folder of this user alone"):
        await router.serve(Peers(epoch=1, last_address=f"unix:{folder}/grpc.sock"))
