"""How is a number written for a reader of a terminal?"""

from trainer.lab.page import unit_of


def short(value: float) -> str:
    """12,288, 0.25, 8e-4, 1.32e24: three digits, of whole numbers all up to a million."""
    if value == int(value) and abs(value) < 1e6:
        return f"{value:,.0f}"
    mantissa, power = f"{value:.2e}".split("e")
    return f"{value:.3g}" if 1e-2 <= value < 1e3 else f"{float(mantissa):g}e{int(power)}"


def human(count: float) -> str:
    """4900000000000 -> 4.9T. Four digits."""
    size, letter = unit_of(count)
    return f"{count / size:.4g}{letter}"
