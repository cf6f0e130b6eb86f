"""Random blobs, and the damage done to them: the cases of a corruption run and their tally."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from services.kvstore.blob import HEADER_BYTES, BlobHeader, BlobKind, seal_into
from services.kvstore.client import KvClientConfig, SaveItem
from tests.soak.damage import Damage, Target, damaged

MODEL_DIGEST, LAYOUT_DIGEST = b"model of a proof", b"layout of proofs"
BLOCK_TOKENS = 128
NUM_LAYERS = 3
# As a body of the tiny models has, and some beyond a page.
PAYLOAD_NBYTES = (1000, 3584, 4096, 9000)
# So many cases among the damaged ones are sound, and must be read.
CONTROL_SHARE = 1 / 16


class Case(NamedTuple):
    """A blob to be stored, and what it is to be read as: None is left alone."""

    key: bytes
    blob: bytes
    damage: Damage | None
    wrong: bytes  # what is to stand in its place; the blob itself if nothing is damaged

    @property
    def payload(self) -> bytes:
        return self.blob[HEADER_BYTES:]

    def header(self) -> BlobHeader:
        nbytes = len(self.blob) - HEADER_BYTES
        return BlobHeader(BlobKind.BODY, self.key, MODEL_DIGEST, LAYOUT_DIGEST, 0, 128, nbytes)

    def item(self) -> SaveItem:
        def fill(view: memoryview) -> None:
            view[:] = self.payload

        return SaveItem(self.key, BlobKind.BODY, 0, BLOCK_TOKENS, len(self.payload), fill)

    def in_place(self, draw: random.Random) -> bytes:
        """`wrong` where something of the blob's length stands: a cut leaves zeros or old bytes."""
        missing = len(self.blob) - len(self.wrong)
        filled = self.wrong + (draw.randbytes(missing) if draw.random() < 0.5 else bytes(missing))
        if filled == self.blob and missing:
            filled = filled[:-1] + bytes([filled[-1] ^ 1])
        return filled


@dataclass(slots=True)
class Tally:
    """Of one tier's corruption run. `undetected` and `lost_controls` must be 0."""

    tier: str
    injected: Counter[str] = field(default_factory=Counter)
    detected: Counter[str] = field(default_factory=Counter)
    controls: int = 0
    lost_controls: int = 0

    @property
    def undetected(self) -> int:
        return self.injected.total() - self.detected.total()

    def read(self, case: Case, payload: bytes | None) -> None:
        """Count what the read path made of a case."""
        if case.damage is None:
            self.controls += 1
            self.lost_controls += payload != case.payload
        else:
            self.injected[case.damage.value] += 1
            self.detected[case.damage.value] += payload is None


def cases(seed: int) -> Iterator[Case]:
    """Each kind of damage in turn, for ever."""
    draw = random.Random(f"corruption {seed}")
    for damage in itertools.cycle(Damage):
        if draw.random() < CONTROL_SHARE:
            blob, key = _sealed(draw, draw.choice(PAYLOAD_NBYTES))
            yield Case(key, blob, None, blob)
        nbytes = draw.choice(PAYLOAD_NBYTES)
        blob, key = _sealed(draw, nbytes)
        other, _ = _sealed(draw, nbytes)
        yield Case(key, blob, damage, damaged(damage, Target(blob, other, NUM_LAYERS), draw))


def client_config(address: str) -> KvClientConfig:
    return KvClientConfig(
        address=address,
        name="proof",
        model_digest=MODEL_DIGEST,
        layout_digest=LAYOUT_DIGEST,
        call_timeout_seconds=10.0,
    )


def _sealed(draw: random.Random, nbytes: int) -> tuple[bytes, bytes]:
    key, payload = draw.randbytes(32), draw.randbytes(nbytes)
    header = BlobHeader(BlobKind.BODY, key, MODEL_DIGEST, LAYOUT_DIGEST, 0, BLOCK_TOKENS, nbytes)
    blob = bytearray(header.nbytes)

    def fill(out: memoryview) -> None:
        out[:] = payload

    seal_into(memoryview(blob), header, fill)
    return bytes(blob), key
