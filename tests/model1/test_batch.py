"""A step's index tensors against what they mean, for any way of cutting any sequences.

The pool's arrays are stood in for by tables of tags: what is written where, and by whom. What a
tensor points at is then a matter of looking it up, step after step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model1.batch import ENTRY_TILE, Batch, Chunk, Compression, Tile
from model1.kv_capacity import PoolCapacity
from model1.kv_pool import KVHandle, KVPool
from tests.services import tiny_model

Tag = tuple[int, int]  # (sequence, token position)
EMPTY: Tag = (-1, -1)  # the row before the first token
# (sliding window, CSA ratio, HCA ratio)
GEOMETRIES = ((8, 4, 128), (6, 4, 16), (2, 2, 2), (4, 1, 3), (128, 4, 128))


@dataclass
class Tables:
    """Who wrote what: flat rows of window pages, entries and compressor states."""

    window: dict[int, Tag] = field(default_factory=dict)
    csa_entries: dict[int, Tag] = field(default_factory=dict)
    hca_entries: dict[int, Tag] = field(default_factory=dict)
    csa_state: dict[int, Tag] = field(default_factory=dict)
    hca_state: dict[int, Tag] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A built batch, with the truth about its rows."""

    pool: KVPool
    batch: Batch
    chunks: list[Chunk]  # as asked for
    sequence_of: dict[int, int]  # id(handle) -> sequence
    rows: list[Tag]
    before: Tables
    after: Tables


@dataclass(frozen=True)
class Run:
    """A geometry, and who takes part in each step: (sequence, new tokens, wanted logits)."""

    geometry: tuple[int, int, int]
    steps: list[list[tuple[int, int, int]]]


@st.composite
def runs(draw: st.DrawFn) -> Run:
    geometry = draw(st.sampled_from(GEOMETRIES))
    sequences = draw(st.integers(1, 4))
    longest = 3 * max(geometry[0], 16)
    sizes = st.one_of(st.just(1), st.integers(1, 9), st.integers(1, longest))
    steps = []
    for _ in range(draw(st.integers(1, 7))):
        order = draw(st.permutations(range(sequences)))
        taking_part = order[: draw(st.integers(1, sequences))]
        step = []
        for sequence in taking_part:
            num_new = draw(sizes)
            step.append((sequence, num_new, draw(st.sampled_from((0, 1, num_new)))))
        steps.append(step)
    return Run(geometry, steps)


def played(run: Run) -> Iterator[Step]:
    """Build every step of the run, keep the tables, commit."""
    (window, csa_ratio, hca_ratio), steps = run.geometry, run.steps
    config = replace(
        tiny_model.CONFIG, sliding_window=window, csa_ratio=csa_ratio, hca_ratio=hca_ratio
    )
    total = [0] * (1 + max(sequence for step in steps for sequence, _, _ in step))
    for step in steps:
        for sequence, num_new, _ in step:
            total[sequence] += num_new
    most = max(sum(num_new for _, num_new, _ in step) for step in steps)
    room = sum(-(-n // hca_ratio) * hca_ratio for n in total)
    pool = KVPool(config, PoolCapacity(len(total), room, most))
    # The last sequence claims first, so that blocks and slots are not in the order of sequences.
    handles: dict[int, KVHandle] = {i: pool.allocate(n) for i, n in reversed([*enumerate(total)])}
    sequence_of = {id(handle): sequence for sequence, handle in handles.items()}
    tables = Tables()
    for step in steps:
        chunks = [
            Chunk(
                handles[sequence],
                handles[sequence].num_tokens,
                [1000 * sequence + handles[sequence].num_tokens + i for i in range(num_new)],
                num_logits,
            )
            for sequence, num_new, num_logits in step
        ]
        batch = Batch.build(pool, chunks)
        rows = [
            (sequence_of[id(chunk.handle)], position)
            for chunk in batch.chunks
            for position in range(chunk.start, chunk.end)
        ]
        before, tables = (
            tables,
            Tables(
                tables.window | dict(zip(batch.window_rows.tolist(), rows, strict=True)),
                _entries_after(tables.csa_entries, batch.csa, rows, csa_ratio),
                _entries_after(tables.hca_entries, batch.hca, rows, hca_ratio),
                _state_after(tables.csa_state, batch.csa, rows),
                _state_after(tables.hca_state, batch.hca, rows),
            ),
        )
        yield Step(pool, batch, chunks, sequence_of, rows, before, tables)
        for chunk in batch.chunks:
            pool.commit(chunk.handle, chunk.end)
        pool.check()


@settings(max_examples=60, deadline=None)
@given(runs())
def test_rows_are_the_chunks_tokens_single_ones_first(run: Run) -> None:
    for step in played(run):
        batch = step.batch
        lengths = [len(chunk.token_ids) for chunk in batch.chunks]
        assert sorted(lengths, key=lambda n: n > 1) == lengths
        assert {id(c) for c in batch.chunks} == {id(c) for c in step.chunks}
        assert batch.positions.tolist() == [position for _, position in step.rows]
        assert batch.token_ids.tolist() == [1000 * seq + pos for seq, pos in step.rows]
        assert batch.num_tokens == len(step.rows)


@settings(max_examples=60, deadline=None)
@given(runs())
def test_logit_rows_are_the_last_of_each_chunk_in_the_order_asked(run: Run) -> None:
    for step in played(run):
        wanted = [
            (step.sequence_of[id(chunk.handle)], position)
            for chunk in step.chunks
            for position in range(chunk.end - chunk.num_logits, chunk.end)
        ]
        assert [step.rows[row] for row in step.batch.logit_rows.tolist()] == wanted


@settings(max_examples=60, deadline=None)
@given(runs())
def test_tiles_cover_each_token_once_in_order_and_lie_in_one_page(run: Run) -> None:
    page_tokens = run.geometry[0] // 2
    for step in played(run):
        at = 0
        for number, tile in enumerate(step.batch.tiles):
            assert tile.start == at
            at = tile.end
            assert number == 0 or tile.num_sequences == 1
            for queries in _queries(tile, step.rows):
                assert len({sequence for sequence, _ in queries}) == 1
                assert len({position // page_tokens for _, position in queries}) == 1
        assert at == len(step.rows)


@settings(max_examples=60, deadline=None)
@given(runs())
def test_a_query_sees_exactly_its_last_positions_through_the_window(run: Run) -> None:
    """What a query's bias leaves visible is its own sequence's last W positions, each once."""
    for step in played(run):
        window, page_tokens = step.pool.layout.window, step.pool.layout.page_tokens
        page_rows = step.pool.layout.arrays["window"].unit_rows
        for tile in step.batch.tiles:
            for g, queries in enumerate(_queries(tile, step.rows)):
                keys = [
                    page * page_rows + offset
                    for page in tile.window_pages[g].tolist()
                    for offset in range(page_tokens)
                ]
                for r, (sequence, position) in enumerate(queries):
                    bias = tile.window_bias[g, r].tolist()
                    assert set(bias) <= {0.0, float("-inf")}
                    seen = [k for k, b in zip(keys, bias, strict=True) if b == 0.0]
                    first = max(0, position + 1 - window)
                    assert [step.after.window[k] for k in seen] == [
                        (sequence, p) for p in range(first, position + 1)
                    ]


@settings(max_examples=60, deadline=None)
@given(runs())
def test_entries_lie_where_tiles_look(run: Run) -> None:
    """Entry n is in block n // per_block of the tile's list, and is written."""
    for step in played(run):
        layout = step.pool.layout
        csa_ratio = layout.csa_state_rows // 2
        for tile in step.batch.tiles:
            width = tile.entry_blocks.shape[1]
            assert width % ENTRY_TILE == 0
            assert width * layout.csa_per_block >= tile.max_csa and width >= tile.max_hca
            for g, queries in enumerate(_queries(tile, step.rows)):
                blocks = tile.entry_blocks[g].tolist()
                for r, (sequence, position) in enumerate(queries):
                    num_csa = (position + 1) // csa_ratio
                    num_hca = (position + 1) // layout.hca_state_rows
                    assert num_csa == int(tile.num_csa[g, r]) <= tile.max_csa
                    assert num_hca <= tile.max_hca
                    for n in range(num_csa):
                        block, inside = divmod(n, layout.csa_per_block)
                        row = blocks[block] * layout.csa_per_block + inside
                        assert step.after.csa_entries[row] == (sequence, n)
                    for n in range(num_hca):
                        assert step.after.hca_entries[blocks[n]] == (sequence, n)
                    hca_bias = tile.hca_bias[g, r].tolist()
                    assert hca_bias == [0.0] * num_hca + [float("-inf")] * (width - num_hca)
                used = -(-int(tile.num_csa[g, -1]) // layout.csa_per_block)
                assert not any(blocks[used:]), "padding points at the block that stays zero"


@settings(max_examples=60, deadline=None)
@given(runs())
def test_closing_windows_read_exactly_their_own_tokens(run: Run) -> None:
    _, csa_ratio, hca_ratio = run.geometry
    for step in played(run):
        _assert_compression(step, step.batch.csa, step.before.csa_state, csa_ratio, 2)
        _assert_compression(step, step.batch.hca, step.before.hca_state, hca_ratio, 1)


def test_a_chunk_must_follow_what_is_committed() -> None:
    pool = tiny_model.pool()
    handle = pool.allocate(10)
    with pytest.raises(AssertionError, match="follow"):
        Batch.build(pool, [Chunk(handle, 1, [5], 1)])


def test_a_sequence_has_one_chunk_in_a_step() -> None:
    pool = tiny_model.pool()
    handle = pool.allocate(10)
    with pytest.raises(AssertionError, match="one chunk a sequence"):
        Batch.build(pool, [Chunk(handle, 0, [5], 0), Chunk(handle, 0, [5, 6], 1)])


def test_a_step_without_tokens_is_nobodys() -> None:
    pool = tiny_model.pool()
    for chunks in ([], [Chunk(pool.allocate(10), 0, [], 0)]):
        with pytest.raises(AssertionError):
            Batch.build(pool, chunks)


def _assert_compression(
    step: Step, plan: Compression, state: dict[int, Tag], ratio: int, windows_read: int
) -> None:
    rows = step.rows
    old = [state[row] for row in plan.old_rows.tolist()]
    readable = [*old, *(rows[token] for token in plan.new_tokens.tolist()), EMPTY]
    assert EMPTY not in readable[:-1]
    expected = [
        [
            (sequence, position) if position >= 0 else EMPTY
            for position in range((window + 1 - windows_read) * ratio, (window + 1) * ratio)
        ]
        for sequence, window in _closing(rows, ratio)
    ]
    assert [[readable[i] for i in slots] for slots in plan.sources.tolist()] == expected
    assert plan.num_entries == len(expected)
    read = {tag for slots in expected for tag in slots}
    assert sorted(readable[:-1]) == sorted(read - {EMPTY}), "read once, and nothing else"
    assert plan.entry_positions.tolist() == [window * ratio for _, window in _closing(rows, ratio)]


def _closing(rows: list[Tag], ratio: int) -> list[Tag]:
    """(sequence, window) of every window whose last token is among the rows."""
    return [
        (sequence, position // ratio)
        for sequence, position in rows
        if position % ratio == ratio - 1
    ]


def _entries_after(
    entries: dict[int, Tag], plan: Compression, rows: list[Tag], ratio: int
) -> dict[int, Tag]:
    written = dict(zip(plan.entry_rows.tolist(), _closing(rows, ratio), strict=True))
    assert not written.keys() & entries.keys(), "an entry is written once"
    return entries | written


def _state_after(state: dict[int, Tag], plan: Compression, rows: list[Tag]) -> dict[int, Tag]:
    saved = [rows[token] for token in plan.saved_tokens.tolist()]
    places = plan.saved_rows.tolist()
    assert len(set(places)) == len(places)
    return state | dict(zip(places, saved, strict=True))


def _queries(tile: Tile, rows: list[Tag]) -> list[list[Tag]]:
    """The (sequence, position) of each of the tile's G x R queries."""
    flat, r = rows[tile.start : tile.end], (tile.end - tile.start) // tile.num_sequences
    return [flat[i : i + r] for i in range(0, len(flat), r)]
