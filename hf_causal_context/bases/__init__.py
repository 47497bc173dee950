"""What is adapted: pretrained pipelines and language models."""
