"""Cross-entropy of modulated output logits, without the matrix of logits."""
