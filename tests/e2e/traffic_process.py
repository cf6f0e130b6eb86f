"""Streams against a gateway from a host of its own: asks until its stdin is closed, and says as
JSON what came of it.

`python traffic_process.py QUESTIONS STREAMS TARGET`: QUESTIONS is JSON, TARGET what gRPC
resolves, such as ipv4:10.0.0.1:50051,10.0.0.2:50051 for all that a headless Service has. What is
shown to them, MODEL1_CLIENT__... says, as for `model1 generate`.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

import grpc
import grpc.aio

from cluster.access import access
from cluster.chaos.questions import Question
from cluster.chaos.traffic import Traffic
from cluster.config import load_settings
from services.rpc import CHANNEL_OPTIONS

# What a client of several gateways wants (README, "On Kubernetes"): all in turn whose health says
# that they serve, and another one when the first refuses before it has accepted.
SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": ""},
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
    shown = access(load_settings(environment=os.environ), target)
    assert shown.tls and shown.tls.server_name and shown.token
    options = [
        *CHANNEL_OPTIONS,
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        ("grpc.ssl_target_name_override", shown.tls.server_name),
    ]
    credentials = grpc.composite_channel_credentials(
        shown.tls.channel_credentials(), grpc.access_token_call_credentials(shown.token)
    )
    async with grpc.aio.secure_channel(target, credentials, options=options) as channel:
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
