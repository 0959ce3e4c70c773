"""What is known about published members of the model family, used only to word likely causes."""

_HIDDEN_SIZES = {
    2048: "V2-Lite or Moonlight",
    5120: "V2 or V2.5",
    7168: "V3, R1, V3.1 or Kimi-K2",
}


def models_with_hidden(hidden: int) -> str:
    """` (V2-Lite or Moonlight)` for a hidden size that published models have, else an empty string."""
    known = _HIDDEN_SIZES.get(hidden)
    return f" ({known})" if known else ""
