"""That every kind of damage is damage, and that a reader who verifies sees each."""

import random

import pytest

from services.kvstore.blob import BlobHeader, BlobKind, Damaged, open_blob, seal_into
from tests.soak.damage import Damage, Target, damaged

MODEL, LAYOUT = b"m" * 16, b"l" * 16
NUM_LAYERS = 3


def sealed(draw: random.Random, key: bytes, payload_nbytes: int) -> bytes:
    header = BlobHeader(BlobKind.BODY, key, MODEL, LAYOUT, 0, 128, payload_nbytes)
    blob, payload = bytearray(header.nbytes), draw.randbytes(payload_nbytes)

    def fill(out: memoryview) -> None:
        out[:] = payload

    seal_into(memoryview(blob), header, fill)
    return bytes(blob)


@pytest.mark.parametrize("damage", Damage)
def test_a_reader_that_verifies_sees_it(damage: Damage) -> None:
    draw = random.Random(damage)
    for _ in range(300):
        size = draw.choice((100, 512, 3000, 9000))
        key, other = draw.randbytes(32), draw.randbytes(32)
        target = Target(sealed(draw, key, size), sealed(draw, other, size), NUM_LAYERS)
        wrong = damaged(damage, target, draw)
        with pytest.raises(Damaged):
            open_blob(memoryview(wrong), key=key, model_digest=MODEL, layout_digest=LAYOUT)
