"""A whole deployment with certificates and tokens: who is let in, and at which of its ports."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.access import Access, access
from cluster.client import Piece, Question, RequestFailed, Unreachable, connected
from cluster.config import Settings, load_settings
from cluster.health import health
from services import rpc
from services.tls import Tls
from services.tokens import TokensUnusable
from tests.certificates import Authority
from tests.cluster.test_roles import PROMPT, deployed_here
from tests.services import tiny_model

TOKEN = "t" * 24
QUESTION = Question(prompt=PROMPT, max_tokens=9)


class Site:
    """Settings with an authority of their own, and what clients may show."""

    def __init__(self, folder: Path, checkpoint: Path, **gateway: object) -> None:
        self.authority = Authority(folder / "ours")
        self.strangers = Authority(folder / "theirs")
        self.tokens_file = folder / "tokens"
        self.tokens_file.write_text(TOKEN + "\n")
        process = self.authority.issue()
        flags = {
            "model.path": checkpoint,
            "gateway.port": 0,
            "gateway.tokens_file": self.tokens_file,
            "topology.attention_workers": 2,
            "tls.ca_file": process.ca_file,
            "tls.cert_file": process.cert_file,
            "tls.key_file": process.key_file,
            "kv.ram_bytes": 2**20,
            "kv.redis": "off",
            **{f"gateway.{key}": value for key, value in gateway.items()},
        }
        self.settings: Settings = load_settings(environment={}, flags=flags)


async def _tokens(at: Access) -> list[int]:
    async with connected(at) as client:
        return [t async for f in client.ask(QUESTION) if isinstance(f, Piece) for t in f.token_ids]


async def _is_healthy(address: str, tls: Tls | None) -> bool:
    async with rpc.channel(address, tls) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5.0)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@asynccontextmanager
async def _deployed(site: Site, folder: Path) -> AsyncIterator[tuple[str, list[str]]]:
    """(the gateway's address, those of all other roles over TCP)"""
    async with deployed_here(site.settings, folder) as (endpoint, supervisor):
        members = (await supervisor.snapshot()).members
        addresses = [member.address for member in members]
        yield endpoint, [a for a in addresses if a != endpoint and not a.startswith("unix:")]


async def test_who_shows_certificate_and_token_is_served_and_nobody_else(
    tiny_checkpoint: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    site = Site(tmp_path, tiny_checkpoint, require_client_certificate=True)
    expected = tiny_model.model().generate(PROMPT, max_tokens=9)
    ours = site.authority.issue("client")
    async with _deployed(site, tmp_path_factory.mktemp("s")) as (endpoint, internal):
        assert await _tokens(Access(endpoint, ours, TOKEN)) == expected
        # What the deployment's own file says is enough on its own machines.
        assert await _tokens(access(site.settings, endpoint)) == expected

        for token in (None, "w" * 24):
            with pytest.raises(RequestFailed, match="UNAUTHENTICATED"):
                await _tokens(Access(endpoint, ours, token))
        for tls in (None, site.authority.believed(), site.strangers.issue()):
            with pytest.raises(Unreachable):
                await _tokens(Access(endpoint, tls, TOKEN))

        # Two workers, two experts, a KV store: each wants a certificate, and no token.
        assert len(internal) == 5
        for address in internal:
            assert await _is_healthy(address, ours)
            assert not await _is_healthy(address, None)
            assert not await _is_healthy(address, site.authority.believed())
            assert not await _is_healthy(address, site.strangers.issue())


async def test_clients_need_no_certificate_unless_one_is_required(
    tiny_checkpoint: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site = Site(tmp_path, tiny_checkpoint)
    expected = tiny_model.model().generate(PROMPT, max_tokens=9)
    believing = site.authority.believed()
    async with _deployed(site, tmp_path_factory.mktemp("s")) as (endpoint, _):
        assert await _tokens(Access(endpoint, believing, TOKEN)) == expected
        with pytest.raises(RequestFailed, match="UNAUTHENTICATED"):
            await _tokens(Access(endpoint, believing))
        with pytest.raises(Unreachable):
            await _tokens(Access(endpoint, None, TOKEN))
        await health(Access(endpoint, believing))  # as a probe asks, without a token
        assert capsys.readouterr().out == "SERVING\n"


def test_what_a_client_shows_comes_from_its_own_section_first(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    site = Site(tmp_path, tiny_checkpoint)
    client = site.authority.issue("client")
    flags = {
        "client.ca_file": client.ca_file,
        "client.cert_file": client.cert_file,
        "client.key_file": client.key_file,
    }
    environment = {"MODEL1_CLIENT__TOKEN": "mine" * 6}
    settings = load_settings(environment=environment, flags=flags)
    at = access(settings, "host:1")
    assert (at.endpoint, at.token) == ("host:1", "mine" * 6)
    assert at.tls == Tls(
        ca_file=client.ca_file, cert_file=client.cert_file, key_file=client.key_file
    )
    assert access(load_settings(environment={}), "host:1") == Access("host:1")
    own = access(site.settings)
    assert own.token == TOKEN
    assert own.tls is not None and own.tls.server_name == "model1"
    site.tokens_file.unlink()
    with pytest.raises(TokensUnusable, match=str(site.tokens_file)):
        access(site.settings)
