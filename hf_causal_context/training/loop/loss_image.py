"""Losses and learning rate over the steps of a training, as an image."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _LOSSES, _RATE, _MARGIN, _LEGEND = 900, 360, 110, 70, 22
_GRAY = (120, 120, 120)


def loss_image(names: Sequence[str], points: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Return curves of the losses of contexts, and below them that of the learning rate.

    Args:
        names: of the contexts.
        points: each with "step", "learning_rate" and "losses", which are by context.
    """
    rows = -(-len(names) // 3)
    image = Image.new("RGB", (_WIDTH, 3 * _MARGIN + _LOSSES + _RATE + rows * _LEGEND), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=14)
    curves = {name: [(p["step"], p["losses"][name]) for p in points if name in p["losses"]] for name in names}
    colors = {name: _color(number, len(names)) for number, name in enumerate(names)}
    top = _MARGIN // 2
    for number, name in enumerate(names):
        x, y = _MARGIN + number % 3 * (_WIDTH - _MARGIN) // 3, top + number // 3 * _LEGEND
        draw.line([(x, y), (x + 20, y)], fill=colors[name], width=3)
        draw.text((x + 28, y), name if len(name) < 28 else name[:27] + "…", fill="black", font=font, anchor="lm")
    top += rows * _LEGEND
    _panel(draw, font, "loss", (top, top + _LOSSES), [(curves[name], colors[name]) for name in names])
    top += _LOSSES + _MARGIN
    rates = [(p["step"], p["learning_rate"]) for p in points]
    _panel(draw, font, "learning rate", (top, top + _RATE), [(rates, _GRAY)])
    return image


def _color(number: int, of: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hls_to_rgb(number / of, 0.42, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def _panel(
    draw: ImageDraw.ImageDraw,
    font: Any,
    title: str,
    heights: tuple[int, int],
    curves: Sequence[tuple[Sequence[tuple[int, float]], tuple[int, int, int]]],
) -> None:
    top, bottom = heights
    left, right = _MARGIN, _WIDTH - _MARGIN // 2
    values = [value for curve, _ in curves for _, value in curve]
    last = max(step for curve, _ in curves for step, _ in curve)
    low, high = min(values), max(values)
    if low == high:  # a line in the middle
        low, high = low - (abs(low) or 1.0), high + (abs(high) or 1.0)
    room = high - low

    def place(step: int, value: float) -> tuple[float, float]:
        return left + step / last * (right - left), bottom - (value - low) / room * (bottom - top)

    draw.line([(left, top), (left, bottom), (right, bottom)], fill=_GRAY)
    for value in {low, low + room}:
        draw.text((left - 6, place(0, value)[1]), f"{value:.3g}", fill=_GRAY, font=font, anchor="rm")
    draw.text((left, bottom + 14), title, fill=_GRAY, font=font, anchor="lm")
    draw.text((right, bottom + 14), f"step {last:,}", fill=_GRAY, font=font, anchor="rm")
    for curve, color in curves:
        places = [place(step, value) for step, value in curve]
        draw.line(places, fill=color, width=2)
        if len(places) == 1:
            draw.circle(places[0], 3, fill=color)
