"""A node's KV blocks: in RAM, on disk, at peers and in Redis. Knows no model and no Ray."""
