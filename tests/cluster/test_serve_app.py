"""What the application is given, before anything runs."""

from typing import Any

import pytest

from cluster.config import SettingsError
from cluster.serve_app import UserConfig, build


def test_the_chart_names_a_file_and_nothing_else() -> None:
    application = build({"config": "/etc/model1/model1.yaml"})
    assert application._bound_deployment.name == "Model1"
    for wrong, words in (
        ({}, "args.config: Field required"),
        ({"config": "f", "replicas": 3}, "args.replicas: Extra inputs are not permitted"),
    ):
        with pytest.raises(SettingsError, match=words):
            build(wrong)


@pytest.mark.parametrize(
    "wrong",
    [{}, {"expert_replicas": 1}, {"expert_replicas": 0, "attention_workers": 1}],
)
def test_sizes_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expert_replicas|attention_workers"):
        UserConfig.model_validate(wrong)
