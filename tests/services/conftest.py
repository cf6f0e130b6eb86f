"""What the tests of several services need."""

import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture
def socket_address() -> Iterator[str]:
    """For a store that is killed and started again where it was; short, as such paths must be."""
    with tempfile.TemporaryDirectory(prefix="model1-") as folder:
        yield f"unix:{folder}/store.sock"
