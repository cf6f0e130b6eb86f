"""The import rules of pyproject.toml hold, and what must stay light does."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_LEVEL = ("cluster", "model1", "protos", "services")


def test_imports_point_one_way_and_each_framework_has_one_home() -> None:
    # In a process of its own: the linter switches the loggers of this one off.
    command = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    )
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyproject_lists_every_package_and_no_other() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in TOP_LEVEL
        for path in (ROOT / top).rglob("*.py")
    }
    assert sorted(pyproject["tool"]["setuptools"]["packages"]) == sorted(on_disk)


def test_every_package_has_an_init() -> None:
    folders = {path.parent for top in TOP_LEVEL for path in (ROOT / top).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("module", ["model1.tokenizer", "services.gateway.server", "cluster.main"])
def test_neither_the_gateway_nor_the_command_line_imports_torch(module: str) -> None:
    statement = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True)
