"""A loss curve as a small drawing in SVG: quick enough to draw again every second, and as sharp on every screen."""

import html
import math
from collections.abc import Mapping, Sequence

__all__ = ["draw_loss_curve", "draw_rate_curve"]

_WIDTH, _HEIGHT = 460, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 30
# Told apart without colours too: one line is dashed.
_COLOURS = {"text_encoder": "#c26a13", "unet": "#2f7ec0"}
_DASHES = {"text_encoder": "6 3", "unet": ""}
_NAMES = {"text_encoder": "text encoder", "unet": "U-Net"}
# The theme's own: notebooks are light and dark.
_INK = "currentColor"

Points = Sequence[tuple[float, float]]


def draw_loss_curve(losses: Mapping[str, Points], steps: Mapping[str, int]) -> str:
    """Draw the losses of both stages, one after the other, with a running mean.

    Args:
        losses: stage -> (step, loss) in order.
        steps: stage -> its number of steps, for the width; a stage that is not in `losses` has not begun.

    Returns:
        SVG text; a frame without a curve while there is no loss.
    """
    total = max(sum(steps.values()), 1)
    usable = [loss for points in losses.values() for _, loss in points if math.isfinite(loss)]
    top = _nice(_upper(usable))
    parts = [_grid(top, total)]
    offset = 0
    for stage in _COLOURS:
        points = [(offset + step, loss) for step, loss in losses.get(stage, ()) if math.isfinite(loss)]
        if points:
            colour = _COLOURS[stage]
            parts.append(_line(points, total, top, colour, width=1, opacity=0.3))
            parts.append(_line(_smooth(points), total, top, colour, width=2, opacity=1, dash=_DASHES[stage]))
        offset += steps.get(stage, 0)
    parts.append(_legend([stage for stage in _COLOURS if losses.get(stage)]))
    return _drawing(parts, _in_words(losses))


def draw_rate_curve(points: Points, total: int, words: str) -> str:
    """Draw an error rate that was measured now and then.

    Args:
        points: (step, rate) in order, 0.1 for a tenth.
        total: steps in all.
        words: what it is, read out too.
    """
    shown = [(step, 100 * rate) for step, rate in points if math.isfinite(rate)]
    total = max(total, 1)
    top = _nice(max((rate for _step, rate in shown), default=0.0) * 1.05)
    colour = _COLOURS["unet"]
    parts = [_grid(top, total)]
    if shown:
        parts.append(_line(shown, total, top, colour, width=2, opacity=1))
        parts += [
            f'<circle cx="{_x(step, total):.1f}" cy="{_y(rate, top):.1f}" r="3" fill="{colour}"/>'
            for step, rate in shown
        ]
    named = f"{words}: not measured yet"
    if shown:
        (last, rate), best = shown[-1], min(shown, key=lambda point: point[1])
        named = f"{words}: {rate:.1f} % at step {last}"
        if best[1] < rate:
            named += f"; best: {best[1]:.1f} % at step {best[0]}"
    parts.append(_text(_WIDTH - _RIGHT, _TOP - 3, named, anchor="end"))
    return _drawing(parts, named)


def _drawing(parts: Sequence[str], named: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" '
        f'aria-label="{html.escape(named, quote=True)}" style="font: 11px sans-serif; max-width: 100%; height: auto">'
        f"{''.join(parts)}</svg>"
    )


def _in_words(losses: Mapping[str, Points]) -> str:
    """What the curve shows, for those who do not see it."""
    told = []
    for stage, name in _NAMES.items():
        points = [(step, loss) for step, loss in losses.get(stage, ()) if math.isfinite(loss)]
        if points:
            first, last = points[0], _smooth(points)[-1]
            told.append(f"{name}: loss {first[1]:.3f} at step {first[0]:g}, about {last[1]:.3f} at step {last[0]:g}")
    return "loss curve; " + "; ".join(told) if told else "loss curve, no step yet"


def _upper(values: Sequence[float]) -> float:
    # The highest of a hundred: one wild step must not flatten the curve.
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))] * 1.1 if ordered else 0.1


def _nice(value: float) -> float:
    """The next of 1, 2, 5, 10... times a power of ten."""
    if value <= 0:
        return 0.1
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if value <= power * factor * (1 + 1e-9))


def _x(step: float, total: int) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / total


def _y(loss: float, top: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * min(max(loss / top, 0.0), 1.0)


def _line(points: Points, total: int, top: float, colour: str, *, width: int, opacity: float, dash: str = "") -> str:
    path = " ".join(f"{_x(step, total):.1f},{_y(loss, top):.1f}" for step, loss in points)
    if len(points) == 1:
        x, y = path.split(",")
        return f'<circle cx="{x}" cy="{y}" r="2" fill="{colour}" opacity="{opacity}"/>'
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"{dashed}/>'
    )


def _smooth(points: Points) -> list[tuple[float, float]]:
    weight = max(0.8, 1 - 10 / len(points))
    mean, out = points[0][1], []
    for step, loss in points:
        mean = weight * mean + (1 - weight) * loss
        out.append((step, mean))
    return out


def _grid(top: float, total: int) -> str:
    lines = []
    for share in (0.0, 0.5, 1.0):
        y = _y(share * top, top)
        lines.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_INK}" opacity=".3"/>'
        )
        lines.append(_text(_LEFT - 6, y + 4, f"{share * top:g}", anchor="end"))
    for step in (0, total // 2, total) if total > 1 else (0, total):
        lines.append(
            _text(_x(step, total), _HEIGHT - _BOTTOM + 15, f"{step}", anchor="middle" if step < total else "end")
        )
    return "".join(lines)


def _legend(stages: Sequence[str]) -> str:
    parts, x = [], _WIDTH - _RIGHT - 100
    for row, stage in enumerate(stages):
        y = _TOP + 4 + 15 * row
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="3" fill="{_COLOURS[stage]}"/>')
        parts.append(_text(x + 18, y + 5, f"loss, {_NAMES[stage]}"))
    return "".join(parts) if stages else _text((_LEFT + _WIDTH) / 2, _HEIGHT / 2, "no step yet", anchor="middle")


def _text(x: float, y: float, words: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{_INK}" text-anchor="{anchor}">{html.escape(words)}</text>'
