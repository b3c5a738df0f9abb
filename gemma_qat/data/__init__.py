"""The text: tokenizer, sources, packing."""
