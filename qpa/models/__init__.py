"""Base models: their config, weights and tokenizer, and what they answer to a probe."""
