"""Thin commands: flags, one library call, where the result lies."""
