"""The network: sizes, declared weights, forward pass, generation."""
