"""The gRPC servers, one package a role, and what runs behind them. Knows nothing of Ray."""
