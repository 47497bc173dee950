"""An adapter on a base, used: samples, texts, edits, LoRA files."""
