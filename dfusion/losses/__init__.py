"""Training losses on log-probs of transitions."""
