"""The public messages and our own types, one into the other. Decides nothing."""

from protos import control_pb2, inference_pb2
from services.gateway.admission import AskedRequest, AskedSampling, AskedStopping
from services.gateway.answer import Accepted, Delta, Final, Frame
from services.gateway.topology import Topology
from services.generation import FINISH_REASON_TO_WIRE, kv_usage_to_wire


def request_from_wire(message: inference_pb2.GenerateRequest) -> AskedRequest:
    prompt: str | tuple[int, ...] | None = None
    match message.WhichOneof("prompt"):
        case "text":
            prompt = message.text
        case "token_ids":
            prompt = tuple(message.token_ids.ids)
    sampling, stopping = message.sampling, message.stopping
    return AskedRequest(
        prompt=prompt,
        request_id=message.request_id,
        session_id=message.session_id,
        cache_salt=message.cache_salt,
        sampling=AskedSampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.HasField("top_p") else None,
            top_k=sampling.top_k,
            seed=sampling.seed if sampling.HasField("seed") else None,
        ),
        stopping=AskedStopping(
            max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
            stop_token_ids=tuple(stopping.stop_token_ids),
            ignore_eos=stopping.ignore_eos,
        ),
    )


def frame_to_wire(frame: Frame) -> inference_pb2.GenerateStreamResponse:
    match frame:
        case Accepted():
            accepted = inference_pb2.Accepted(request_id=frame.request_id, worker=frame.worker)
            return inference_pb2.GenerateStreamResponse(accepted=accepted)
        case Delta():
            delta = inference_pb2.Delta(
                sequence_number=frame.sequence_number, token_ids=frame.token_ids, text=frame.text
            )
            return inference_pb2.GenerateStreamResponse(delta=delta)
        case Final():
            final = inference_pb2.Final(
                finish_reason=FINISH_REASON_TO_WIRE[frame.finish_reason], usage=_usage(frame)
            )
            return inference_pb2.GenerateStreamResponse(final=final)


def add_to_response(response: inference_pb2.GenerateResponse, frame: Frame) -> None:
    """The unary answer is all frames of the stream put together."""
    match frame:
        case Accepted():
            response.request_id, response.worker = frame.request_id, frame.worker
        case Delta():
            response.token_ids.extend(frame.token_ids)
            response.text += frame.text
        case Final():
            response.finish_reason = FINISH_REASON_TO_WIRE[frame.finish_reason]
            response.usage.CopyFrom(_usage(frame))


def topology_to_wire(topology: Topology) -> control_pb2.GetTopologyResponse:
    members = [
        control_pb2.Member(
            name=member.name,
            role=member.role,
            address=member.address,
            pid=member.pid,
            node_id=member.node_id,
            state=member.state,
            requests=member.requests,
            expert_group=member.expert_group,
            restarts=member.restarts,
            stats=member.stats,
        )
        for member in topology.members
    ]
    return control_pb2.GetTopologyResponse(
        epoch=topology.epoch, members=members, autoscaled=topology.autoscaled
    )


def _usage(final: Final) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=final.prompt_tokens,
        completion_tokens=final.completion_tokens,
        kv=None if final.kv is None else kv_usage_to_wire(final.kv),
    )
