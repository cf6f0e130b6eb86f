"""README's tree is the map of the code, so it lists what there is and nothing else. What it says
that was tried is what was tried."""

import json
from pathlib import Path

from tests.e2e.traffic_process import SERVICE_CONFIG

ROOT = Path(__file__).parents[1]
PACKAGES = ("cluster", "model1", "protos", "services")
INDENT = 2


def _paths_in_tree(readme: str) -> dict[str, str]:
    """Path -> comment. A name that ends in a slash opens a folder for the deeper lines below it."""
    tree = readme.split("## Layout", 1)[1].split("```", 2)[1]
    folders: list[str] = []
    comments: dict[str, str] = {}
    for line in tree.splitlines()[1:]:
        name, _, comment = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // INDENT
        folders = folders[:depth]
        comments["".join(folders) + name] = comment.strip()
        if name.endswith("/"):
            folders.append(name)
    return comments


def _paths_on_disk() -> set[str]:
    paths = set[str]()
    for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*")):
        relative = file.relative_to(ROOT)
        if file.suffix not in (".py", ".proto"):
            continue
        if "_pb2" in file.name:
            paths.add("protos/*_pb2*")
        elif file.name == "__init__.py":
            paths.add(f"{relative.parent}/")
        else:
            paths.add(str(relative))
    return paths


def test_the_tree_lists_every_module() -> None:
    listed = _paths_in_tree((ROOT / "README.md").read_text())
    assert sorted(_paths_on_disk() - listed.keys()) == []


def test_the_tree_lists_nothing_that_is_gone() -> None:
    listed = _paths_in_tree((ROOT / "README.md").read_text())
    assert [path for path in listed if not any(ROOT.glob(path))] == []


def test_every_line_of_the_tree_says_what_it_is() -> None:
    comments = _paths_in_tree((ROOT / "README.md").read_text())
    assert [path for path, comment in comments.items() if not comment] == []


def test_the_service_config_is_the_one_that_lost_no_request() -> None:
    told = (ROOT / "README.md").read_text().split("```json\n", 1)[1].split("```", 1)[0]
    assert json.loads(told) == SERVICE_CONFIG
