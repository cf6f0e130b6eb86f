"""Who gets a connection when a server has certificates."""

import os
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services import rpc
from services.tls import Tls, TlsUnusable
from tests.certificates import Authority

SERVING = health_pb2.HealthCheckResponse.SERVING


async def _ask(address: str, tls: Tls | None) -> int:
    async with rpc.channel(address, tls) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5.0)
        return int(answer.status)


async def _refused(address: str, tls: Tls | None) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _ask(address, tls)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_both_ends_show_a_certificate_of_the_same_authority(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    async with await rpc.start_server([], "127.0.0.1:0", tls=ours.issue()) as server:
        assert await _ask(server.address, ours.issue("client")) == SERVING
        await _refused(server.address, None)
        await _refused(server.address, ours.believed())
        await _refused(server.address, theirs.issue())
        foreign = theirs.issue()
        liar = Tls(ca_file=ours.ca_file, cert_file=foreign.cert_file, key_file=foreign.key_file)
        await _refused(server.address, liar)


async def test_a_client_without_a_certificate_is_served_where_none_is_required(
    tmp_path: Path,
) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    async with await rpc.start_server(
        [], "127.0.0.1:0", tls=ours.issue(), require_client_certificate=False
    ) as server:
        assert await _ask(server.address, ours.believed()) == SERVING
        await _refused(server.address, theirs.believed())
        await _refused(server.address, None)


async def test_a_certificate_for_another_name_is_not_believed(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    async with await rpc.start_server([], "127.0.0.1:0", tls=ours.issue()) as server:
        client = ours.issue("client")
        elsewhere = Tls(
            ca_file=client.ca_file,
            cert_file=client.cert_file,
            key_file=client.key_file,
            server_name="somebody-else",
        )
        await _refused(server.address, elsewhere)


async def test_without_a_server_name_the_host_is_what_the_certificate_must_have(
    tmp_path: Path,
) -> None:
    ours = Authority(tmp_path)
    plain = Tls(ca_file=ours.ca_file)
    async with await rpc.start_server(
        [], "127.0.0.1:0", tls=ours.issue(), require_client_certificate=False
    ) as server:
        assert await _ask(server.address, plain) == SERVING


async def test_a_unix_socket_needs_none(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    address = f"unix:{tmp_path}/a.sock"
    async with await rpc.start_server([], address, tls=ours.issue()):
        assert await _ask(address, None) == SERVING
        assert await _ask(address, ours.issue()) == SERVING


async def test_a_renewed_certificate_is_shown_without_a_restart(tmp_path: Path) -> None:
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    served = old.issue()
    async with await rpc.start_server([], "127.0.0.1:0", tls=served) as server:
        assert await _ask(server.address, old.issue("client")) == SERVING
        renewed = new.issue()
        for before, after in zip(_files(served), _files(renewed), strict=True):
            os.replace(after, before)
        new_client = new.issue("client")
        new_client = Tls(
            ca_file=served.ca_file,
            cert_file=new_client.cert_file,
            key_file=new_client.key_file,
            server_name=new_client.server_name,
        )
        assert await _ask(server.address, new_client) == SERVING


def _files(tls: Tls) -> tuple[Path, Path, Path]:
    assert tls.cert_file is not None and tls.key_file is not None
    return tls.ca_file, tls.cert_file, tls.key_file


async def test_half_renewed_files_leave_the_last_ones_in_use(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    served = ours.issue()
    client = ours.issue("client")
    assert served.cert_file is not None
    async with await rpc.start_server([], "127.0.0.1:0", tls=served) as server:
        served.cert_file.write_text("")
        assert await _ask(server.address, client) == SERVING


@pytest.mark.parametrize("part", ["ca_file", "cert_file", "key_file"])
@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_a_file_that_cannot_be_used_is_named(
    tmp_path: Path, part: str, content: bytes | None
) -> None:
    tls = Authority(tmp_path).issue()
    file: Path = getattr(tls, part)
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TlsUnusable, match=str(file)):
        tls.check()


async def test_a_server_needs_a_certificate(tmp_path: Path) -> None:
    with pytest.raises(TlsUnusable, match=r"tls\.cert_file"):
        await rpc.start_server([], "127.0.0.1:0", tls=Authority(tmp_path).believed())
