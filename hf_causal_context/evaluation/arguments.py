"""The settings of `hf-causal-context evaluate`."""

from __future__ import annotations
