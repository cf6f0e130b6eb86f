"""`model1 status --health`: does a gateway serve? For probes: Kubernetes' own speaks no TLS."""

from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.access import Access
from cluster.client import RequestFailed, connected, named_failures

TIMEOUT_SECONDS = 5.0


async def health(access: Access) -> None:
    """Prints the status; raises `RequestFailed` unless it is SERVING."""
    async with connected(access) as client:
        with named_failures(access.endpoint):
            stub = health_pb2_grpc.HealthStub(client.channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise RequestFailed(f"{access.endpoint} is {status}")
    print(status)
