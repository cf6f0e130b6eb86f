"""The serving benchmark's plumbing: both sides and the echo, on a model that takes no time."""

from pathlib import Path

import pytest

from cluster.bench_serve import compare
from cluster.bench_workload import Workload
from tests.services import tiny_model


@pytest.mark.slow  # a whole deployment and two processes more
def test_a_tiny_deployment_is_compared_with_one_process(tiny_checkpoint: Path) -> None:
    workload = Workload(
        batch=3,
        min_prompt_tokens=5,
        max_prompt_tokens=20,
        max_tokens=6,
        vocab_size=tiny_model.VOCAB_SIZE,
    )
    report = compare(tiny_checkpoint, workload, num_pairs=1, machine="here")
    assert len(report.throughput.turns) == len(report.decode.turns) == 1
    assert report.throughput.ratio > 0 and report.decode.ratio > 0
    assert report.crossing.p99 >= report.crossing.p50 >= report.crossing_wait.p50 > 0
    assert 0 <= report.overlapped_share < 1  # the first steps never are
    assert report.echo.p50 > 0
    hidden, k = tiny_model.CONFIG.hidden_size, tiny_model.CONFIG.num_experts_per_tok
    assert report.request_bytes == 3 * (2 * hidden + 8 * k)
    assert report.reply_bytes == 3 * 4 * hidden
