"""Which compressed entries a query gets: those of the highest scores, the lowest of equal ones."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model1.batch import Batch, Chunk
from model1.config import AttentionKind, ModelConfig
from model1.indexer import IndexQueries
from model1.kv_arrays import Rows
from model1.kv_capacity import PoolCapacity
from model1.kv_pool import KVPool
from model1.modules import IndexerWeights
from model1.rope import Rope, Rotation
from tests.services import tiny_model

CONFIG = replace(
    tiny_model.CONFIG,
    attention_kinds=(AttentionKind.CSA,),
    hash_routed=(False,),
    max_position_embeddings=4096,
)


class Layer:
    """One CSA layer's indexer over sequences whose entries are drawn, not computed."""

    def __init__(self, config: ModelConfig, lengths: Sequence[int], seed: int = 0) -> None:
        """`lengths`: tokens of each sequence before the step."""
        self.config = config
        self.draw = torch.Generator().manual_seed(seed)
        capacity = PoolCapacity(len(lengths), 4096 * len(lengths), 4096)
        self.pool = KVPool(config, capacity)
        keys = self.pool.layers[0].index_keys
        assert isinstance(keys, Rows)
        self.keys = keys
        self.keys.units.normal_(generator=self.draw)
        self.keys.units[0] = 0.0
        self.weights = IndexerWeights(config, torch.float32, torch.device("cpu"))
        for weight in (self.weights.wq_b.weight, self.weights.weights_proj.weight):
            weight.data.normal_(generator=self.draw)
        self.handles = [self.pool.allocate(4096) for _ in lengths]
        for handle, length in zip(self.handles, lengths, strict=True):
            for end in [*range(1000, length, 1000), length]:
                self.pool.grow_window(handle, end)
                self.pool.commit(handle, end)

    @torch.no_grad()
    def select(self, new_tokens: Sequence[int]) -> list[list[int]]:
        """Entries chosen for each query of a step, in the order of the batch's rows."""
        chunks = [
            Chunk(handle, handle.num_tokens, [0] * n, 0)
            for handle, n in zip(self.handles, new_tokens, strict=True)
        ]
        batch = Batch.build(self.pool, chunks)
        inverse_frequencies = Rope(self.config, torch.device("cpu")).compress
        by = Rotation.at(batch.positions, inverse_frequencies)
        self.positions = batch.positions
        self.sequence_of_row = [i for i, n in enumerate(new_tokens) for _ in range(n)]
        self.x = self._normal(batch.num_tokens, self.config.hidden_size)
        self.q_latent = self._normal(batch.num_tokens, self.config.q_lora_rank)
        queries = IndexQueries(self.x, self.q_latent, self.weights, by, self.config)
        chosen: list[list[int]] = []
        for tile in batch.tiles:
            numbers = queries.select(tile, self.keys, self.config.index_topk).flatten(0, 1)
            for row, visible in zip(numbers.tolist(), tile.num_csa.flatten(), strict=True):
                assert len(row) == self.config.index_topk
                assert row == sorted(set(row))
                chosen.append([number for number in row if number < visible])
        return chosen

    def scores(self, row: int) -> Tensor:
        """float64 scores of the entries that query `row` sees, from the formula (spec 2.5)."""
        config = self.config
        heads, dim, r = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
        position = int(self.positions[row])
        handle = self.handles[self.sequence_of_row[row]]
        q = (self.weights.wq_b.weight.double() @ self.q_latent[row].double()).view(heads, dim)
        pairs = torch.view_as_complex(q[:, -r:].reshape(heads, r // 2, 2).contiguous())
        theta = config.compress_rope_theta ** -(torch.arange(r // 2, dtype=torch.float64) * 2 / r)
        turned = pairs * torch.polar(torch.ones_like(theta), theta * position)
        q = torch.cat([q[:, :-r], torch.view_as_real(turned).flatten(1)], dim=1)
        a = self.weights.weights_proj.weight.double() @ self.x[row].double()
        keys = (
            self.keys.units[handle.blocks]
            .flatten(0, 1)
            .double()[: (position + 1) // config.csa_ratio]
        )
        return (a / (dim * heads) ** 0.5) @ (q @ keys.T).relu()

    def best(self, row: int) -> list[int]:
        """The brute force: all entries, best first, the lowest number first among equals."""
        scores = self.scores(row).detach().tolist()
        order = sorted(range(len(scores)), key=lambda number: (-scores[number], number))
        return sorted(order[: self.config.index_topk])

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw)


@pytest.mark.parametrize("heads", (1, 2, 16))
def test_the_best_entries_are_chosen_and_zeros_tie_to_the_lowest(heads: int) -> None:
    """With one or two heads ReLU makes a half or a quarter of the scores exactly 0 (trap T16)."""
    layer = Layer(replace(CONFIG, index_n_heads=heads, index_topk=5), [157])
    num_tied = 0
    for row, chosen in enumerate(layer.select([40])):
        assert chosen == layer.best(row)
        zeros = (layer.scores(row) == 0).nonzero().flatten().tolist()
        num_tied += bool(0 < len(set(zeros) & set(chosen)) < len(zeros))
    assert (num_tied > 0) == (heads < 16), "zeros were there to choose among"


def test_sequences_of_any_length_are_chosen_for_side_by_side() -> None:
    layer = Layer(replace(CONFIG, index_topk=7), [40, 900, 5, 131])
    for row, chosen in enumerate(layer.select([1, 1, 1, 1])):
        assert chosen == layer.best(row)


def test_more_entries_than_are_scored_at_once() -> None:
    config = replace(CONFIG, csa_ratio=1, index_topk=9, max_position_embeddings=8192)
    layer = Layer(config, [4090])
    layer.keys.units[layer.handles[0].blocks[:-1]] = 0.0
    assert layer.select([2])[1] == layer.best(1)


@pytest.mark.parametrize(
    ("csa_ratio", "hca_ratio"), ((16, 16), (8, 16), (4, 16), (4, 32), (4, 64), (4, 96), (4, 128))
)
@pytest.mark.parametrize("heads", (1, 8))
def test_equal_keys_tie_wherever_they_stand(heads: int, csa_ratio: int, hca_ratio: int) -> None:
    """An entry's score is a function of query and key, not of its place or of the others."""
    config = replace(
        CONFIG, csa_ratio=csa_ratio, hca_ratio=hca_ratio, index_n_heads=heads, index_topk=3
    )
    for entries in (4, 5, 9, 31, 33, 47, 80):
        layer = Layer(config, [entries * csa_ratio - 1], seed=entries)
        layer.keys.units[:] = layer.keys.units[1, 0]
        assert layer.select([1]) == [[0, 1, 2]]


def test_a_query_that_sees_fewer_than_it_may_choose_gets_them_all() -> None:
    layer = Layer(replace(CONFIG, index_topk=20), [60, 400])
    first, second = layer.select([1, 1])
    assert first == list(range(61 // 4))
    assert len(second) == 20
