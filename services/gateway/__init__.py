"""Gateway: client streams, admission, tokenizer. Imports no torch."""
