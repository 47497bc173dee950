"""Beside what else a real pipeline or server holds: nothing is silently wrong."""
