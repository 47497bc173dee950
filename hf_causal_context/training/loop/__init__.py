"""The training loop that all kinds of models share."""
