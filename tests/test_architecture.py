"""The import rules of pyproject.toml hold, and what must stay light does."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parents[1]
TOP_LEVEL = ("cluster", "model1", "protos", "services")


def test_imports_point_one_way_and_each_framework_has_one_home(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    status = lint_imports(no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


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
