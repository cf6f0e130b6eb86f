"""The environment every test starts from, whatever the shell that started it held."""

import os

import hypothesis
import pytest

_SCRUBBED_PREFIXES = ("MODEL1_", "RAY_")
_FIXED = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # One compute thread a process: two collapse when anything else runs on a small machine.
    "OMP_NUM_THREADS": "1",
}


def _settle_environment() -> None:
    for name in [name for name in os.environ if name.startswith(_SCRUBBED_PREFIXES)]:
        del os.environ[name]
    os.environ.update(_FIXED)


# What takes long on a busy machine is not wrong; a test's own timeout is limit enough.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

# While this file is imported, before any other conftest: Ray and OpenMP read theirs when they are
# first imported, and pytest_configure comes after that.
_settle_environment()


@pytest.fixture(autouse=True)
def _scrubbed_environment() -> None:
    _settle_environment()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes a minute on a quiet machine takes several on one with other work."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(600))
