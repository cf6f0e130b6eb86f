"""How large a pool is: from limits, or from a budget of device bytes, to units and bytes.

Plain arithmetic over a layout.
"""

from dataclasses import dataclass, replace

import torch

from model1.config import ModelConfig
from model1.errors import ConfigError
from model1.kv_layout import KVFormat, KVLayout, Unit


@dataclass(frozen=True, slots=True)
class PoolCapacity:
    """How much the pool holds.

    `max_sequences` at once; `max_tokens` in all of them together (rounded up to blocks);
    `max_step_tokens` in one forward step. Of the CSA entries the device holds `hot_entries` a layer
    and host memory the rest; None: the device holds them all.
    """

    max_sequences: int
    max_tokens: int
    max_step_tokens: int
    hot_entries: int | None = None

    def __post_init__(self) -> None:
        if self.hot_entries is not None and self.hot_entries < 1:
            raise ConfigError(f"hot_entries must be at least 1, not {self.hot_entries}")

    @classmethod
    def within(
        cls,
        num_bytes: int,
        config: ModelConfig,
        dtype: torch.dtype,
        *,
        max_sequences: int,
        max_step_tokens: int,
        kv_format: KVFormat = KVFormat.NATIVE,
        hot_entries: int | None = None,
    ) -> "PoolCapacity":
        """As many tokens as a pool of at most `num_bytes` on the device holds.

        Raises `ConfigError` where that is not even one block.
        """
        layout = KVLayout.of(config, dtype, kv_format)
        smallest = cls(max_sequences, layout.block_tokens, max_step_tokens, hot_entries)
        least = smallest.num_bytes(layout)
        if least > num_bytes:
            raise ConfigError(
                f"{max_sequences} sequences in steps of {max_step_tokens} tokens need a KV pool of "
                f"at least {least} bytes, not {num_bytes}"
            )
        two = replace(smallest, max_tokens=2 * layout.block_tokens)
        block_nbytes = two.num_bytes(layout) - least
        if block_nbytes:
            num_blocks = 1 + (num_bytes - least) // block_nbytes
        else:  # layers with sliding windows only: the whole context of every sequence
            num_blocks = max_sequences * -(-config.max_position_embeddings // layout.block_tokens)
        return replace(smallest, max_tokens=num_blocks * layout.block_tokens)

    def num_units(self, layout: KVLayout) -> dict[Unit, int]:
        """Units that a pool has, the zero page and block among them."""
        # Before a step a sequence holds at most 3 pages, and one more than its tokens fill in it.
        num_pages = 4 * self.max_sequences + -(-self.max_step_tokens // layout.page_tokens)
        num_blocks = -(-self.max_tokens // layout.block_tokens)
        return {Unit.PAGE: num_pages + 1, Unit.BLOCK: num_blocks + 1, Unit.SLOT: self.max_sequences}

    def num_hot(self, layout: KVLayout) -> int:
        """CSA entries of all layers that the device has room for beside host memory."""
        return (self.hot_entries or 0) * len(layout.arrays["csa_entries"].layers)

    def num_bytes(self, layout: KVLayout) -> int:
        """On the device."""
        units = sum(n * layout.nbytes(unit) for unit, n in self.num_units(layout).items())
        hot = self.num_hot(layout) * layout.arrays["csa_entries"].row_nbytes
        return units - self.num_host_bytes(layout) + hot

    def num_host_bytes(self, layout: KVLayout) -> int:
        """In host memory."""
        if self.hot_entries is None:
            return 0
        return self.num_units(layout)[Unit.BLOCK] * layout.arrays["csa_entries"].unit_nbytes
