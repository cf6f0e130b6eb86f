"""Blobs that a test can tell apart: contents follow from the number."""

import numpy as np

from services.kvstore.blob import BlobHeader, BlobKind, seal_into

MODEL = b"m" * 16
LAYOUT = b"l" * 16


def sample_key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def sample_payload(number: int, num_bytes: int) -> bytes:
    return np.random.default_rng(number).bytes(num_bytes)


def sample_blob(number: int, payload_nbytes: int = 1000) -> memoryview:
    header = BlobHeader(
        kind=BlobKind.BODY,
        key=sample_key(number),
        model_digest=MODEL,
        layout_digest=LAYOUT,
        start=0,
        end=128,
        payload_nbytes=payload_nbytes,
    )
    blob = memoryview(bytearray(header.nbytes))

    def fill(out: memoryview) -> None:
        out[:] = sample_payload(number, payload_nbytes)

    seal_into(blob, header, fill)
    return blob
