"""What the tokenizer reaches outside itself."""
