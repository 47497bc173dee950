"""Fine-tuning adapters and training autoencoders."""
