"""Text on its way into a run: rows of data, tokenizers, prompts, examples to learn from, rewards."""
