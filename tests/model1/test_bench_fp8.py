"""What `model1 bench fp8` counts and compares; the speeds only that they are of both sides."""

import pytest
import torch

from model1 import Model, shipped_model_dir
from model1.bench_fp8 import (
    KV_SHAPES,
    codec_speed,
    kv_bytes,
    model_speed,
    random_quality,
    recall_quality,
)
from model1.tokenizer import Tokenizer
from tests.services import tiny_model


@pytest.mark.parametrize(
    ("name", "native", "fp8"), (("V4-Flash", 6880, 3850), ("V4-Pro", 9848, 5511))
)
def test_bytes_of_the_releases_are_those_of_the_spec(name: str, native: int, fp8: int) -> None:
    """Section 3.2, which leaves out fractions of a byte."""
    counted = kv_bytes(name)
    assert (int(counted.native_per_token), int(counted.fp8_per_token)) == (native, fp8)


def test_every_model_takes_fewer_bytes() -> None:
    for name in KV_SHAPES:
        counted = kv_bytes(name)
        assert counted.fp8_per_token < counted.native_per_token
        assert counted.fp8_tail < counted.native_tail


def test_speeds_are_of_both_sides() -> None:
    speeds = codec_speed(8, 2) + model_speed(tiny_model.model(), 2, 40, 3)
    assert [s.case.split(",")[0] for s in speeds] == ["write 8 rows", "gather 8 rows", "decode"]
    assert all(s.native_ms > 0 and s.fp8_ms > 0 and s.ratio > 0 for s in speeds)


def test_quality_is_of_every_position() -> None:
    compared = random_quality(tiny_model.model(), 60)
    assert compared.num_tokens == 60
    assert 0 < compared.largest_difference < 1 and compared.kl_nats > 0
    assert 0.5 < compared.same_argmax <= 1


def test_the_shipped_model_recalls_from_records() -> None:
    model = Model.from_checkpoint(shipped_model_dir(), torch.bfloat16)
    compared = recall_quality(model, Tokenizer.from_dir(shipped_model_dir()), 4, 12)
    assert compared.native_recall is not None and compared.fp8_recall is not None
    assert compared.native_recall > 0.7 and compared.fp8_recall > 0.7
    assert compared.same_argmax > 0.9
