"""The whole deployment in this process: a worker's engine with every expert beside it, no gRPC.

Admits, numbers and decodes through the gateway's own code, so that the answer is the same.
"""

import asyncio
from collections.abc import AsyncIterator

from cluster.client import End, Piece, Question
from cluster.config import Settings
from cluster.preflight import checked_model, model_directory


async def ask_here(settings: Settings, question: Question) -> AsyncIterator[Piece | End]:
    """Pieces, then one End, as `Client.ask`. Raises a `ModelError`."""
    from model1.tokenizer import Tokenizer
    from services.gateway.admission import (
        Admission,
        AskedRequest,
        AskedSampling,
        AskedStopping,
        ModelLimits,
    )
    from services.gateway.answer import Answer

    model = checked_model(settings.model)
    directory = model_directory(settings.model)
    limits = ModelLimits(
        vocab_size=model.vocab_size,
        max_context_length=model.max_position_embeddings,
        default_max_tokens=settings.gateway.default_max_tokens,
        eos_token_ids=model.eos_token_ids,
    )
    admission = Admission(Tokenizer.from_dir(directory), limits)
    request = admission.admit(
        AskedRequest(
            prompt=question.prompt,
            sampling=AskedSampling(
                temperature=question.temperature, top_p=question.top_p, seed=question.seed
            ),
            stopping=AskedStopping(max_tokens=question.max_tokens),
        )
    )
    # Only now, so that a bad request is told without waiting for torch.
    from model1.kv_capacity import PoolCapacity
    from services.attention.engine import EngineConfig
    from services.attention.loading import load_local_engine

    engine = load_local_engine(
        directory,
        dtype=settings.model.dtype,
        device=settings.model.device,
        capacity=PoolCapacity(1, request.max_total_tokens, settings.attention.max_batch_tokens),
        config=EngineConfig(),
        kv_format=settings.attention.kv_format,
    )
    answer = Answer(request, admission.tokenizer)
    running = asyncio.create_task(engine.run())
    try:
        with engine.submit(request) as stream:
            async for event in stream:
                delta = answer.delta(event.token_ids)
                yield Piece(delta.token_ids, delta.text)
                if event.finish_reason is not None:
                    if rest := answer.rest():
                        yield Piece((), rest.text)
                    final = answer.final(event.finish_reason)
                    yield End(final.finish_reason, final.prompt_tokens, final.completion_tokens)
    finally:
        engine.close()
        await running
