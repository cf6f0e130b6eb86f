"""The pinned renders are what the chart makes today."""

import pytest

from tests.helm.golden import FOLDER, VALUES, rendered


@pytest.mark.parametrize("name", VALUES)
def test_the_render_is_the_pinned_one(name: str) -> None:
    pinned = (FOLDER / f"{name}.yaml").read_text()
    assert rendered(VALUES[name]) == pinned, "`make chart` writes it again; look at the diff"


def test_nothing_else_is_pinned() -> None:
    assert sorted(file.stem for file in FOLDER.iterdir()) == sorted(VALUES)
