import gc
import re
import weakref
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from model1.modules import packed
from services.errors import ExpertNotHeld, ModelMismatch
from services.expert.replica import ExpertReplica, ReplicaCounters
from services.wire import ExpertRows
from tests.services.expert_banks import HIDDEN_SIZE, seeded_bank


def _call(
    *,
    layer: int = 0,
    expert_ids: tuple[int, ...] = (2, 3, 2),
    hidden_size: int = HIDDEN_SIZE,
    dtype: type = np.float32,
) -> ExpertRows:
    rows = np.random.default_rng(0).standard_normal((2, hidden_size), dtype=np.float32)
    rows.flags.writeable = False  # as what arrives
    return ExpertRows(
        layer=layer,
        rows=rows.astype(dtype),
        row_index=np.array([0, 0, 1], dtype=np.int32)[: len(expert_ids)],
        expert_ids=np.array(expert_ids, dtype=np.int32),
        weights=np.array([0.5, 0.25, 1.0], dtype=np.float32)[: len(expert_ids)],
    )


def test_a_replica_computes_what_the_bank_computes() -> None:
    bank = seeded_bank([2, 3])
    call = _call(layer=1)
    with torch.inference_mode():
        expected = bank(
            1,
            torch.tensor(call.rows),
            torch.tensor(call.row_index).long(),
            torch.tensor(call.expert_ids).long(),
            torch.tensor(call.weights),
        )
    got = ExpertReplica("r", bank).compute(call)
    np.testing.assert_array_equal(got, expected.numpy(), strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_warming_up_computes_with_every_expert_of_every_layer_and_counts_as_nothing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = seeded_bank([2, 3, 7], dtype)
    computed = []
    forward = bank.forward

    def watched(
        layer: int, rows: Tensor, row_index: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> Tensor:
        computed.append((layer, expert_ids.tolist()))
        return forward(layer, rows, row_index, expert_ids, weights)

    monkeypatch.setattr(bank, "forward", watched)
    replica = ExpertReplica("r", bank)
    replica.warm_up()
    assert computed == [(layer, [2, 3, 7]) for layer in range(bank.config.num_hidden_layers)]
    assert replica.counters == ReplicaCounters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_depends_neither_on_its_company_nor_on_who_else_is_held(
    dtype: torch.dtype,
) -> None:
    words = np.float32 if dtype == torch.float32 else np.uint16
    together = ExpertReplica("all", seeded_bank(range(8), dtype)).compute(_call(dtype=words))
    alone = ExpertReplica("one", seeded_bank([2], dtype)).compute(
        _call(expert_ids=(2,), dtype=words)
    )
    np.testing.assert_array_equal(alone[0], together[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (_call(layer=3), "layer 3: the model of replica r has 3 layers"),
        (_call(expert_ids=(2, 8)), "expert 8: the model of replica r has 8 experts"),
        (_call(expert_ids=(-1,)), "expert -1: the model of replica r has 8 experts"),
        (_call(hidden_size=32), "rows of hidden size 32: replica r has 64"),
        (_call(dtype=np.uint16), "rows of 16 bits: replica r computes in torch.float32"),
    ],
)
def test_a_call_for_another_model_is_refused_with_the_value(call: ExpertRows, words: str) -> None:
    replica = ExpertReplica("r", seeded_bank([2, 3]))
    with pytest.raises(ModelMismatch, match=re.escape(words)):
        replica.compute(call)
    assert replica.counters.calls == 0


def test_an_expert_that_is_not_held_now_is_another_replicas() -> None:
    replica = ExpertReplica("r", seeded_bank([2, 3]))
    with pytest.raises(ExpertNotHeld, match="expert 5 is not held by replica r"):
        replica.compute(_call(expert_ids=(2, 5)))
    assert replica.counters.calls == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_come_later_compute_as_those_held_from_the_start(dtype: torch.dtype) -> None:
    words = np.float32 if dtype == torch.float32 else np.uint16
    call = _call(dtype=words)
    expected = ExpertReplica("r", packed(seeded_bank(range(8), dtype))).compute(call)
    replica = ExpertReplica("r", packed(seeded_bank([7, 2], dtype)))
    replica.take(packed(seeded_bank([5, 3], dtype)))
    assert list(replica.expert_ids) == [2, 3, 5, 7]
    np.testing.assert_array_equal(replica.compute(call), expected)
    replica.drop([7, 5])
    assert list(replica.expert_ids) == [2, 3]
    np.testing.assert_array_equal(replica.compute(call), expected)
    replica.drop([3])
    with pytest.raises(ExpertNotHeld, match="expert 3"):
        replica.compute(call)
    replica.take(packed(seeded_bank([3], dtype)))
    np.testing.assert_array_equal(replica.compute(call), expected)


def test_no_expert_is_held_twice() -> None:
    replica = ExpertReplica("r", packed(seeded_bank([2, 3])))
    with pytest.raises(ValueError, match="expert 3 is held already"):
        replica.take(packed(seeded_bank([3])))


def test_a_dropped_expert_frees_its_memory() -> None:
    bank = packed(seeded_bank([2, 3]))
    (layer, *_) = bank.layers
    held = [weakref.ref(weights) for weights in cast(tuple[Tensor, ...], layer.w13)]
    ExpertReplica("r", bank).drop([2])
    gc.collect()
    assert [each() is None for each in held] == [True, False]


def test_no_pairs_are_no_rows() -> None:
    got = ExpertReplica("r", seeded_bank([2])).compute(_call(expert_ids=()))
    assert got.shape == (0, HIDDEN_SIZE)


def test_counters_count_calls_rows_pairs_and_time() -> None:
    replica = ExpertReplica("r", seeded_bank([2, 3]))
    replica.compute(_call())
    replica.compute(_call())
    counters = replica.counters
    assert (counters.calls, counters.rows, counters.pairs) == (2, 4, 6)
    assert counters.compute_seconds.sum_seconds > 0
