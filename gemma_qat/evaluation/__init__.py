"""How close is the student: perplexity, KL divergence, top-1 agreement."""
