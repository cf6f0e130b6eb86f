"""The main promise: whatever the topology, 32 concurrent requests get the tokens of one process,
and those of an implementation that nobody here wrote."""

import asyncio
import random
from pathlib import Path

import pytest

from model1 import Model
from protos import attention_pb2, attention_pb2_grpc, inference_pb2, inference_pb2_grpc
from services import rpc
from tests.e2e.command import served
from tests.model1 import oracle
from tests.services import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_REQUESTS = 32
MAX_TOKENS = 64
LONGEST_PROMPT = 2048
CASE = oracle.Case(
    "served",
    {
        "compress_ratios": [0, 4, 128, 4],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "vocab_size": 512,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "index_n_heads": 32,
        "index_topk": 16,
        "sliding_window": 128,
        "max_position_embeddings": 4096,
    },
    (LONGEST_PROMPT,),
)
TOPOLOGIES = {  # flags, and how many of each role answer
    "1x1": ((1, 1, 1), {"attention": 1, "router": 1, "expert": 1, "gateway": 1}),
    "2x2": ((2, 2, 1), {"attention": 2, "router": 1, "expert": 2, "gateway": 1}),
    "1x4x2": ((1, 4, 2), {"attention": 1, "router": 1, "expert": 8, "gateway": 1}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(CASE.name)
    tiny_model.write_model_dir(directory)  # for its tokenizer; the rest is written over
    oracle.build(CASE, directory)
    return directory


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Every edge of a window or a prefill chunk, then lengths at random."""
    draw = random.Random(5)
    edges = [1, 2, 3, 4, 5, 127, 128, 129, 511, 512, 513, LONGEST_PROMPT]
    lengths = edges + [draw.randint(1, LONGEST_PROMPT) for _ in range(NUM_REQUESTS - len(edges))]
    draw.shuffle(lengths)
    return [oracle.token_ids(CASE, length, seed=i) for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Of one process, once they are known to be transformers' own."""
    ours = Model.from_checkpoint(checkpoint)
    theirs = oracle.random_model(CASE)
    answers = [ours.generate(ids, max_tokens=MAX_TOKENS) for ids in prompts]
    for ids, answer in zip(prompts, answers, strict=True):
        assert answer == oracle.greedy(theirs, ids, MAX_TOKENS), f"prompt of {len(ids)} tokens"
    assert len({tuple(answer) for answer in answers}) == NUM_REQUESTS
    return answers


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_concurrent_requests_get_the_tokens_of_one_process(
    name: str, checkpoint: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    (workers, groups, replicas), wanted = TOPOLOGIES[name]
    flags = (
        *("--attention-workers", str(workers)),
        *("--expert-groups", str(groups)),
        *("--expert-replicas", str(replicas)),
    )
    with served("--model", checkpoint, *flags) as deployment:
        answers = asyncio.run(ask_all(deployment.endpoint, prompts))
        wrong = [
            f"request {i}: prompt of {len(prompts[i])} tokens"
            for i, answer in enumerate(answers)
            if answer != expected[i]
        ]
        assert wrong == []

        members = deployment.members()
        for role, count in wanted.items():
            served_by = [m for m in members if m["role"] == role and int(m["requests"]) > 0]
            assert len(served_by) == count, f"{role}s that served: {served_by}"
        workers_at = [m["address"] for m in members if m["role"] == "attention"]
        assert asyncio.run(count_live(workers_at)) == 0
        stopped = deployment.stop()
    assert (stopped.code, stopped.stderr) == (0, "")


async def ask_all(endpoint: str, prompts: list[list[int]]) -> list[list[int]]:
    async with rpc.channel(endpoint) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        return await asyncio.gather(*(ask(stub, ids) for ids in prompts))


async def ask(stub: inference_pb2_grpc.InferenceStub, ids: list[int]) -> list[int]:
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=ids),
        stopping=inference_pb2.StoppingParams(max_tokens=MAX_TOKENS),
    )
    answer: list[int] = []
    async for frame in stub.GenerateStream(request, timeout=300):
        answer.extend(frame.delta.token_ids)
    return answer


async def count_live(addresses: list[str]) -> int:
    """Sequences that the attention workers still hold."""
    live = 0
    for address in addresses:
        async with rpc.channel(address) as channel:
            stub = attention_pb2_grpc.AttentionStub(channel)
            stats = await stub.Stats(attention_pb2.AttentionStatsRequest())
            live += stats.waiting_sequences + stats.running_sequences
    return live
