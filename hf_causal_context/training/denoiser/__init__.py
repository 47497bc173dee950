"""What the training of denoisers does in its own way."""
