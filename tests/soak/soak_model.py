"""The model of the soak: every attention kind, and far more entries than its indexer may select."""

from functools import cache

from model1.config import ModelConfig
from model1.model import Model
from model1.modules import packed
from tests.services import tiny_model
from tests.soak.traffic import LONGEST_TOKENS

SEED = 11
INDEX_TOPK = 64  # of up to LONGEST_TOKENS / 4 entries

CONFIG = ModelConfig.from_dict(
    tiny_model.CONFIG.to_dict()
    | {
        "compress_ratios": [0, 4, 128],
        "sliding_window": 16,
        "index_topk": INDEX_TOPK,
        "max_position_embeddings": LONGEST_TOKENS + 256,
    }
)


@cache
def soak_model() -> Model:
    """Packed as a worker has it. Equal in every process."""
    model = tiny_model.random_model(CONFIG, SEED)
    packed(model.trunk)
    packed(model.experts)
    return model
