"""The quality of answers: perplexity, divergence from a reference, and what PPL hides."""
