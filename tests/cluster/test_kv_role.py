"""Where a KV store's files lie."""

import stat
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.kv_role import SHARED_MEMORY, claimed_folder, shared_memory
from cluster.members import DeploymentError


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


def test_more_than_shared_memory_has_goes_elsewhere(tmp_path: Path) -> None:
    assert shared_memory(1, otherwise=tmp_path) == SHARED_MEMORY
    assert shared_memory(2**60, otherwise=tmp_path) == tmp_path
