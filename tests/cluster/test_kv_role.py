"""Where a KV store's files lie."""

import os
import socket
import stat
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cluster.config import load_settings
from cluster.kv_role import (
    SHARED_MEMORY,
    claimed_folder,
    cold_config,
    load_kv_store,
    shared_memory,
)
from cluster.members import DeploymentError, Peers, Redis
from cluster.roles import Place


def test_stores_that_are_given_one_path_take_a_folder_each(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kv"
    with ExitStack() as first, ExitStack() as second:
        assert first.enter_context(claimed_folder(path)) == path / "0"
        assert second.enter_context(claimed_folder(path)) == path / "1"
        first.close()
        with claimed_folder(path) as again:
            assert again == path / "0"  # as a restart finds it
    assert stat.S_IMODE((path / "0").stat().st_mode) == 0o700


def test_a_path_that_is_no_folder_is_named(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    words = f"cannot use kv.disk_path {taken}: Not a directory"
    with pytest.raises(DeploymentError, match=words), claimed_folder(taken):
        pass


def test_what_goes_wrong_in_the_folder_is_not_blamed_on_the_path(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), claimed_folder(tmp_path):
        raise BlockingIOError


def test_a_redis_of_our_own_is_everybodys() -> None:
    settings = load_settings(environment={}).kv
    cold = cold_config(settings, Redis("redis://10.0.0.1:7000", "hush"))
    assert cold is not None
    assert (cold.redis.url, cold.redis.password) == ("redis://10.0.0.1:7000", "hush")
    assert (cold.max_bytes, cold.ttl_seconds) == (
        settings.redis_bytes,
        settings.redis_ttl_seconds,
    )


def test_a_redis_of_somebody_else_is_told_its_password(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("from-file\n")
    flags = {"kv.redis": "rediss://user@cache:6380/1"}
    environment = {"MODEL1_KV__REDIS_PASSWORD": "from-environment"}
    settings = load_settings(environment=environment, flags=flags).kv
    cold = cold_config(settings, None)
    assert cold is not None
    assert (cold.redis.url, cold.redis.password) == (flags["kv.redis"], "from-environment")
    flags["kv.redis_password_file"] = str(file)
    cold = cold_config(load_settings(environment=environment, flags=flags).kv, None)
    assert cold is not None
    assert cold.redis.password == "from-file"
    file.unlink()
    with pytest.raises(DeploymentError, match=r"redis_password_file .*password: No such file"):
        cold_config(load_settings(environment=environment, flags=flags).kv, None)


def test_redis_can_be_off() -> None:
    settings = load_settings(environment={}, flags={"kv.redis": "off"}).kv
    assert cold_config(settings, None) is None


def test_more_than_shared_memory_has_goes_elsewhere(tmp_path: Path) -> None:
    assert shared_memory(1, otherwise=tmp_path) == SHARED_MEMORY
    assert shared_memory(2**60, otherwise=tmp_path) == tmp_path


async def test_a_store_that_comes_back_is_where_it_was_with_its_redis(tmp_path: Path) -> None:
    settings = load_settings(
        environment={}, flags={"kv.ram_bytes": 2**20, "kv.redis_bytes": 2**20}
    ).kv
    serve = load_kv_store("kvstore-0", settings, Place("127.0.0.1", tmp_path))
    first = await serve(Peers())
    redis = first.listening.redis
    assert redis is not None
    assert redis.run_by == "kvstore-0"
    await first.stop(0.0)
    again = await serve(Peers(redis=redis, last_address=first.listening.address))
    try:
        assert again.listening == first.listening
        port = urlsplit(redis.url).port
        assert port is not None
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(f"AUTH {redis.password}\r\n".encode())
            assert connection.recv(16).startswith(b"+OK")
    finally:
        await again.stop(0.0)


async def test_another_store_uses_the_redis_and_starts_none(tmp_path: Path) -> None:
    settings = load_settings(environment={}, flags={"kv.ram_bytes": 2**20}).kv
    redis = Redis("redis://127.0.0.1:1", "hush", run_by="kvstore-0")
    serve = load_kv_store("kvstore-1", settings, Place("127.0.0.1", tmp_path))
    serving = await serve(Peers(redis=redis))
    try:
        assert serving.listening.redis == redis
        assert not os.listdir(tmp_path)
    finally:
        await serving.stop(0.0)
