"""Quantization-aware training of Gemma 3 by interception of its weights."""

__version__ = '0.1.0'
