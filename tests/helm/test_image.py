"""The image's recipe: what a linter finds, what the chart relies on, and its install steps run."""

import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helm.chart import ROOT, container_of, find, pod_of, render

RECIPE = ROOT / "helm" / "image" / "Dockerfile"
HADOLINT = Path(sys.executable).parent / "hadolint"
PREFIX = "/opt/model1"


class Step(NamedTuple):
    instruction: str
    arguments: str


def _stages() -> list[list[Step]]:
    """Each FROM and what follows it; continued lines are one, what comes before is the first's."""
    lines = [line for line in RECIPE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    steps = [Step(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]
    starts = [n for n, step in enumerate(steps) if step.instruction == "FROM"]
    return [steps[n:end] for n, end in zip(starts, [*starts[1:], len(steps)], strict=True)]


def _arguments(stage: list[Step], instruction: str) -> list[str]:
    return [step.arguments for step in stage if step.instruction == instruction]


def _copied() -> list[str]:
    """What the first stage takes from the repository."""
    return [source for each in _arguments(_stages()[0], "COPY") for source in each.split()[:-1]]


def _is_sent_to_the_builder(path: str) -> bool:
    """By .dockerignore's rules as far as ours go: the last that matches the name or a parent."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        if fnmatch(path, pattern) or path.partition("/")[0] == pattern:
            sent = line.startswith("!")
    return sent


def test_a_linter_finds_nothing() -> None:
    done = subprocess.run([HADOLINT, RECIPE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_linter_finds_what_is_wrong(tmp_path: Path) -> None:
    worse = tmp_path / "Dockerfile"
    worse.write_text(RECIPE.read_text().replace("WORKDIR /tmp\n", "RUN cd /tmp && sudo true\n"))
    done = subprocess.run([HADOLINT, worse], capture_output=True, text=True)
    assert done.returncode != 0
    assert "DL3004" in done.stdout


def test_the_base_is_pinned() -> None:
    (image,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", RECIPE.read_text(), flags=re.MULTILINE)
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", image)
    assert all(stage[0].arguments.startswith("${PYTHON_IMAGE}") for stage in _stages())


def test_what_runs_is_not_root_and_the_user_of_the_chart() -> None:
    (user,) = _arguments(_stages()[-1], "USER")
    for name in ("head", "attention", "experts"):
        context = pod_of(render(), name)["securityContext"]
        assert user == f"{context['runAsUser']}:{context['runAsGroup']}"


def test_the_entry_is_the_command() -> None:
    assert _arguments(_stages()[-1], "ENTRYPOINT") == ['["model1"]']


def test_the_programs_that_the_chart_runs_are_there() -> None:
    """model1 and ray come with the package; the server's place is of our making."""
    recipe = RECIPE.read_text()
    assert f"ENV PATH={PREFIX}/bin:$PATH" in recipe
    assert f"{PREFIX}/bin/valkey-server" in recipe
    valkey = find(render(), "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    assert "exec valkey-server " in valkey["command"][2]
    assert container_of(render(), "attention")["image"] == valkey["image"]


def test_every_package_is_copied_and_sent_to_the_builder() -> None:
    copied = _copied()
    assert {"cluster", "services", "model1", "protos", "pyproject.toml"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert _is_sent_to_the_builder(source), source
    for kept in (".venv/bin/python", "tests/conftest.py", ".git/config", "cluster/__pycache__"):
        assert not _is_sent_to_the_builder(kept), kept


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_install_steps_run_in_a_clean_folder(tmp_path: Path) -> None:
    """RUN and COPY of the first stage, in a folder instead of the root and with the package index
    of this machine: no image is built."""
    source, prefix = tmp_path / "src", tmp_path / "opt" / "model1"
    source.mkdir()
    prefix.parent.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "VARIANT": "cpu",
        "CPU_TORCH_INDEX": _package_index(),
        **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
    }
    for step in _stages()[0]:
        if step.instruction == "COPY":
            *names, into = step.arguments.split()
            for name in names:
                target = source / into
                subprocess.run(["cp", "-r", ROOT / name, target], check=True)
        elif step.instruction == "RUN":
            command = step.arguments.replace(PREFIX, str(prefix))
            shell = ["/bin/bash", "-euo", "pipefail", "-c", command]
            done = subprocess.run(
                shell, cwd=source, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    _assert_runs(prefix, environment, tmp_path)


def test_an_unknown_variant_is_refused() -> None:
    (choice,) = (run for run in _arguments(_stages()[0], "RUN") if "case" in run)
    done = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", choice],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "VARIANT": "tpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "VARIANT is tpu; it must be cpu or cuda" in done.stderr


def _package_index() -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple")


def _assert_runs(prefix: Path, environment: dict[str, str], folder: Path) -> None:
    path = f"{prefix}/bin:{environment['PATH']}"
    for command in (
        ["model1", "--version"],
        ["ray", "--version"],
        ["valkey-server", "--version"],
        ["model1", "generate", "Once upon a time,", "--local", "--max-tokens", "4"],
    ):
        done = subprocess.run(
            [prefix / "bin" / command[0], *command[1:]],
            cwd=folder,
            env=environment | {"PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
