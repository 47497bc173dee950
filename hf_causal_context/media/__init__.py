"""Images and videos as they are stored: what is read of their pixels and frames, and what is said of it."""
