"""An adapter on a web page, to try it by hand."""

from .page import build_demo, demo_or_reason, launch, serve

__all__ = ["build_demo", "demo_or_reason", "launch", "serve"]
