"""Student's t distribution, by which a mean over a few seeds gets its interval; without scipy."""

import math

LEVEL = 0.95


def student_t_quantile(degrees: int, level: float = LEVEL) -> float:
    """The t with P(|T| <= t) = level, T of Student's distribution with so many degrees of freedom.

    From the closed form of its distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4) by bisection.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_share(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def student_t_p_value(t: float, degrees: int) -> float:
    """P(|T| >= |t|), two-sided."""
    return 1.0 - _central_share(math.atan(abs(t) / math.sqrt(degrees)), degrees)


def _central_share(angle: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan(angle))."""
    odd, squared = degrees % 2, math.cos(angle) ** 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for number in range(2 + odd, degrees + 1, 2):
        total += term
        term *= (number - 1) / number * squared
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
