"""Streams against a gateway from a host of its own: asks until its stdin is closed, and says as
JSON what came of it.

`python traffic_process.py QUESTIONS STREAMS TARGET`: QUESTIONS is JSON, TARGET what gRPC
resolves, such as ipv4:10.0.0.1:50051,10.0.0.2:50051 for all that a headless Service has.
"""

import asyncio
import json
import sys
from pathlib import Path

import grpc.aio

from cluster.chaos.questions import Question
from cluster.chaos.traffic import Traffic
from services.rpc import CHANNEL_OPTIONS

# What a client of several gateways wants: all of them in turn, and another one when the first
# refuses before it has accepted.
SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": "model1.v1.Inference"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}


async def main(questions: list[Question], streams: int, target: str) -> None:
    options = [*CHANNEL_OPTIONS, ("grpc.service_config", json.dumps(SERVICE_CONFIG))]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        traffic = Traffic(channel, questions, streams=streams, seed=0)
        running = asyncio.create_task(traffic.run())
        print("asking", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        traffic.stop()
        await running
    log = traffic.log
    gaps = [end - begin for exchange in log.exchanges for begin, end in exchange.gaps]
    result = {
        "answered": log.num_answered,
        "tokens": log.num_tokens,
        "wrong": log.wrong,
        "failed": log.failed,
        "longest_gap_seconds": round(max(gaps, default=0.0), 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    rows = json.loads(Path(sys.argv[1]).read_text())
    asked = [
        Question(**{**row, "prompt": tuple(row["prompt"]), "answer": tuple(row["answer"])})
        for row in rows
    ]
    asyncio.run(main(asked, int(sys.argv[2]), sys.argv[3]))
