"""`model1 bench kv`: what the KV tiers save and what they cost, on the mini model.

Each part takes turns between its sides within one run. Reports medians and ratios; judges nothing
but that all sides give the same tokens.
"""
