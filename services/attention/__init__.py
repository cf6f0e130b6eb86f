"""Attention worker: sequences, the batching loop, the KV pool, all weights but the experts."""
