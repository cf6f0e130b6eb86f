"""GET /metrics of a real gateway with real workers, and with members that are away."""

import asyncio
import socket
import urllib.error
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from protos import control_pb2
from services.gateway import metrics, store
from services.gateway.metrics import ask_all
from services.gateway.server import GatewayConfig, GatewayServer
from services.gateway.store import StoreAddress
from services.gateway.topology import Topology
from services.kvstore.config import KvStoreConfig
from services.rpc import AddressUnavailable
from tests.services.gateway.deployed import (
    Deployment,
    StagedOperations,
    deployed,
    failure,
    frame,
    request,
    topology,
)
from tests.services.gateway.scraped import Samples, fetched, scraped
from tests.services.kvstore.store_process import StoreProcess, running_store

RAM_BYTES = 16 << 20
UP_STORE = {"role": "kvstore", "name": "kvstore-0"}


@pytest.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path, metrics_port=0) as running:
        yield running


@pytest.fixture
def store_process(tmp_path: Path, socket_address: str) -> Iterator[StoreProcess]:
    config = KvStoreConfig(
        name="kvstore-0", address=socket_address, arena_dir=tmp_path / "arena", ram_bytes=RAM_BYTES
    )
    with running_store(config) as process:
        yield process


async def url_of(deployment: Deployment) -> str:
    about = await deployment.control.GetServerInfo(control_pb2.GetServerInfoRequest())
    return str(about.metrics_url)


async def scrape(deployment: Deployment) -> Samples:
    return await asyncio.to_thread(scraped, await url_of(deployment))


async def test_counters_move_by_exactly_what_was_asked(deployment: Deployment) -> None:
    before = await scrape(deployment)
    assert before("model1_requests_received_total") == 0
    assert before.sum("model1_prompt_tokens_total") == 0
    answer = await deployment.inference.Generate(request(max_tokens=7))
    await failure(deployment.inference.Generate(request(max_tokens=0)))
    after = await scrape(deployment)
    assert after("model1_requests_received_total") == 2
    assert after("model1_requests_accepted_total") == 1
    assert after("model1_requests_ended_total", outcome="finished") == 1
    assert after("model1_requests_ended_total", outcome="rejected") == 1
    assert after.sum("model1_requests_ended_total") == 2
    assert after("model1_prompt_tokens_total", source="computed") == 3
    assert after.sum("model1_prompt_tokens_total") == 3
    assert after("model1_generated_tokens_total") == len(answer.token_ids)
    assert after("model1_worker_asked_tokens_total", worker="attention-0") == 3
    assert after("model1_worker_computed_tokens_total", worker="attention-0") == 3
    generated = len(answer.token_ids)
    assert after("model1_worker_generated_tokens_total", worker="attention-0") == generated
    assert after("model1_worker_asked_tokens_total", worker="attention-1") == 0
    assert after("model1_up", role="expert", name="expert-1-0") == 1


async def test_a_request_under_way_is_in_flight_and_in_the_batch(deployment: Deployment) -> None:
    call = deployment.inference.GenerateStream(request(max_tokens=390))
    await frame(call, "accepted")
    await frame(call, "delta")
    found = await scrape(deployment)
    call.cancel()
    assert found("model1_requests_in_flight") == 1
    assert found.sum("model1_requests_ended_total") == 0
    assert found("model1_worker_running_sequences", worker="attention-0") == 1
    assert found("model1_worker_kv_limit_blocks", worker="attention-0") > 0
    await deployment.freed()


async def test_both_text_formats_are_on_offer(deployment: Deployment) -> None:
    url = await url_of(deployment)
    kind, text = await asyncio.to_thread(fetched, url)
    assert kind.startswith("text/plain; version=")
    assert text.startswith("# HELP model1_")
    kind, text = await asyncio.to_thread(fetched, url, "application/openmetrics-text;version=1.0.0")
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")


@pytest.mark.parametrize("path", ["/", "/metric", "/metrics/", "/favicon.ico"])
async def test_an_unknown_path_is_not_found(deployment: Deployment, path: str) -> None:
    url = (await url_of(deployment)).removesuffix("/metrics") + path
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        await asyncio.to_thread(fetched, url)
    caught.value.close()


async def test_a_dead_worker_is_down_and_the_others_are_told(deployment: Deployment) -> None:
    await deployment.workers[0].stop(grace_s=0)
    found = await scrape(deployment)
    assert found("model1_up", role="attention", name="attention-0") == 0
    assert found("model1_up", role="attention", name="attention-1") == 1
    told = list(found.labels("model1_worker_running_sequences"))
    assert told == [{"worker": "attention-1"}]


async def test_a_dead_store_is_down_and_degraded(
    tmp_path: Path, store_process: StoreProcess
) -> None:
    address = StoreAddress("kvstore-0", store_process.address)
    async with deployed(tmp_path, address, metrics_port=0) as deployment:
        alive = await scrape(deployment)
        assert alive("model1_up", **UP_STORE) == 1
        assert alive("model1_kv_store_degraded", store="kvstore-0") == 0
        budget = alive("model1_kv_tier_budget_bytes", store="kvstore-0", tier="ram")
        assert 0 < budget <= RAM_BYTES
        store_process.kill()
        dead = await scrape(deployment)
        assert dead("model1_up", **UP_STORE) == 0
        assert dead("model1_kv_store_degraded", store="kvstore-0") == 1
        why = {"store": "kvstore-0", "tier": "all", "reason": "no answer"}
        assert list(dead.labels("model1_kv_degraded_info")) == [why]
        assert list(dead.labels("model1_kv_tier_budget_bytes")) == []
        await deployment.inference.Generate(request(max_tokens=2))
        again = await scrape(deployment)
        assert again("model1_requests_ended_total", outcome="finished") == 1


async def test_a_frozen_store_holds_up_nobody_but_the_scrape(
    tmp_path: Path, store_process: StoreProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CALL_TIMEOUT_SECONDS", 2.0)
    address = StoreAddress("kvstore-0", store_process.address)
    async with deployed(tmp_path, address, metrics_port=0) as deployment:
        assert (await scrape(deployment))("model1_up", **UP_STORE) == 1
        store_process.freeze()
        try:
            scraping = asyncio.create_task(scrape(deployment))
            await asyncio.sleep(0.1)
            await url_of(deployment)  # the gateway answers meanwhile
            assert not scraping.done()
            async with asyncio.timeout(20):
                assert (await scraping)("model1_up", **UP_STORE) == 0
        finally:
            store_process.thaw()


async def test_a_supervisor_that_fails_or_hangs_is_down(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "TOPOLOGY_SECONDS", 0.05)

    async def fails() -> Topology:
        raise RuntimeError("supervisor died")

    async def hangs() -> Topology:
        await asyncio.Event().wait()
        raise AssertionError

    for source in (fails, hangs):
        report = await ask_all(deployment.gateway.gateway, "1", source)
        assert report.topology is None
        assert [name for name, _ in report.workers] == ["attention-0", "attention-1"]


async def test_a_scrape_ends_with_the_gateway(tmp_path: Path) -> None:
    async with deployed(tmp_path, metrics_port=0) as deployment:
        url = await url_of(deployment)
        await scrape(deployment)
    with pytest.raises(urllib.error.URLError, match="refused"):
        await asyncio.to_thread(fetched, url)


async def test_without_a_port_there_are_no_metrics(tmp_path: Path) -> None:
    async with deployed(tmp_path) as deployment:
        assert await url_of(deployment) == ""


async def test_a_port_in_use_is_named_and_no_other_stays_taken(
    deployment: Deployment, tmp_path: Path
) -> None:
    directory = tmp_path  # the running gateway's
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = GatewayConfig(
            model_dir=directory, version="1", address="127.0.0.1:0", metrics_port=port
        )
        with pytest.raises(AddressUnavailable, match=rf"127\.0\.0\.1:{port} for metrics: .*in use"):
            await GatewayServer.open(config, topology, StagedOperations())
    config = GatewayConfig(
        model_dir=directory, version="1", address=deployment.gateway.address, metrics_port=port
    )
    with pytest.raises(AddressUnavailable, match=deployment.gateway.address):
        await GatewayServer.open(config, topology, StagedOperations())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
