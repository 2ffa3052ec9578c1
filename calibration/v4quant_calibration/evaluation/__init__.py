"""What a forward pass is asked: scores, divergences, needles, drafts, errors of weights."""
