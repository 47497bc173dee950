"""What a user is told: names and values in messages, how to install, progress."""
