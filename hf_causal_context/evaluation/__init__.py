"""Does it compose? Measures on samples."""
