"""The errors model1 raises for things that come from outside.

    ModelError
    |- ConfigError       a config.json that does not describe a model we can run
    |- CheckpointError   files that are missing, damaged or do not fit their config
    |- InvalidRequest    token ids or sampling parameters that make no sense
    `- PoolExhausted     the KV pool cannot hold what was asked for

What only our own bug can break is an `assert`, not one of these.
"""


class ModelError(Exception):
    """Base of every error that model1 raises on purpose."""


class ConfigError(ModelError):
    """A model configuration is incomplete or contradicts itself."""


class CheckpointError(ModelError):
    """A checkpoint is missing, damaged, or does not fit its configuration."""


class InvalidRequest(ModelError):
    """Token ids or sampling parameters outside of what the model accepts."""


class PoolExhausted(ModelError):
    """The KV pool has no room for the sequence now."""
