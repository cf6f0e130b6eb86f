"""Training of the small shipped model: corpus, tokenizer, loop, evaluation."""
