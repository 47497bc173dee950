"""The PEFT method: its config, layers and model, how contexts reach them, and what adapters become."""
