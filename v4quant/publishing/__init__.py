"""From finished folders to a model repository: card, commits, delivery."""
