"""Every layout in and out: GGUF, Hugging Face, Orbax."""
