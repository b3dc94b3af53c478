"""The contrast of two colours, as the guidelines for accessibility measure it."""

__all__ = ["contrast"]


def contrast(first: str, second: str) -> float:
    """The contrast of two colours (#rrggbb) between 1 and 21; text should have 4.5.

    Source: WCAG 2.2, relative luminance and contrast ratio.
    """
    high, low = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
