"""State, optimizer, step, loop, metrics."""
