"""Every error has one status, whoever defines it."""

import grpc
import pytest

from model1 import errors as model_errors
from services import errors


def _tree(root: type[Exception]) -> set[type[Exception]]:
    return {root}.union(*(_tree(child) for child in root.__subclasses__()))


@pytest.mark.parametrize("root", [errors.ServiceError, model_errors.ModelError])
def test_every_error_class_has_a_status(root: type[Exception]) -> None:
    modules = (errors.__name__, model_errors.__name__)
    ours = {kind for kind in _tree(root) if kind.__module__ in modules}
    assert len(ours) > 3
    assert ours <= set(errors.STATUS)


def test_the_table_names_no_other_class() -> None:
    assert set(errors.STATUS) == _tree(errors.ServiceError) | _tree(model_errors.ModelError)


def test_the_tree_in_the_module_docstring_lists_every_service_error() -> None:
    assert errors.__doc__ is not None
    for kind in _tree(errors.ServiceError):
        assert kind.__name__ in errors.__doc__


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.value[0]])
def test_a_status_keeps_its_meaning_over_the_next_hop(code: grpc.StatusCode) -> None:
    error = errors.from_rpc_error(
        grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "why", "")
    )
    assert str(error) == "why"
    kept = errors.STATUS[type(error)]
    assert kept is (code if code in errors.STATUS.values() else grpc.StatusCode.INTERNAL)
