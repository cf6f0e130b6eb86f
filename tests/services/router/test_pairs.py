import numpy as np
import pytest
import torch

from model1.moe import combine
from services.router.pairs import added_in_order, gather
from services.wire import LayerRows


def _call(num_rows: int = 3) -> LayerRows:
    ids = np.array([[0, 2, 5], [1, 2, 3], [0, 4, 5]], dtype=np.int32)[:num_rows]
    return LayerRows(
        layer=2,
        rows=np.arange(4 * num_rows, dtype=np.float32).reshape(num_rows, 4),
        expert_ids=ids,
        weights=(ids / 8).astype(np.float32),
    )


def test_a_share_holds_each_row_that_it_needs_once() -> None:
    call = _call()
    share = gather(call, np.array([0, 1, 6, 7, 8]))  # pairs of rows 0, 0, 2, 2, 2
    np.testing.assert_array_equal(share.rows, call.rows[[0, 2]])
    assert share.row_index.tolist() == [0, 0, 1, 1, 1]
    assert share.expert_ids.tolist() == [0, 2, 0, 4, 5]
    assert share.weights.tolist() == [0, 0.25, 0, 0.5, 0.625]
    assert share.row_index.dtype == share.expert_ids.dtype == np.dtype(np.int32)


def test_a_share_that_needs_every_row_copies_none() -> None:
    call = _call()
    assert gather(call, np.array([2, 3, 8])).rows is call.rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "k", "hidden"), [(1, 1, 8), (5, 2, 33), (32, 8, 64)])
def test_sums_are_bitwise_those_of_the_model(
    dtype: torch.dtype, num_rows: int, k: int, hidden: int
) -> None:
    draw = torch.Generator().manual_seed(num_rows)
    scale = torch.exp2(torch.randint(-30, 30, (num_rows, k, hidden), generator=draw).float())
    pairs = (torch.randn(num_rows, k, hidden, generator=draw) * scale).to(dtype)
    pairs[0, :, 0] = -0.0  # an order that starts from +0 would lose the sign
    words = pairs.view(torch.uint16) if dtype == torch.bfloat16 else pairs
    got = added_in_order(words.numpy().reshape(num_rows * k, hidden), num_rows)
    expected = combine(pairs).numpy()
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32), strict=True)


def test_the_sum_of_a_single_pair_is_its_row_exactly() -> None:
    every_word = torch.arange(0, 2**16, dtype=torch.int32).to(torch.uint16).reshape(-1, 64)
    expected = every_word.view(torch.bfloat16).float().numpy()
    got = added_in_order(every_word.numpy(), len(every_word))
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


def test_adding_leaves_the_pair_rows_as_they_were() -> None:
    pairs = np.ones((4, 8), dtype=np.float32)
    added_in_order(pairs, 2)
    np.testing.assert_array_equal(pairs, np.ones((4, 8), dtype=np.float32))
