"""GGUF: names, metadata, tokenizer, files written and read."""
