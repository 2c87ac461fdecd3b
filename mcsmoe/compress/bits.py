"""What rounded weights take: groups of 32 share a scale and a zero, each of 16 bits."""

GROUP = 32
_SHARED = 32  # bits of a group's scale and zero


def bits_a_weight(bits: int) -> float:
    """What one rounded weight takes, its share of scale and zero included."""
    return bits + _SHARED / GROUP
