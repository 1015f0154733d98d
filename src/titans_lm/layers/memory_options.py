"""The options of `NeuralMemory`: their ranges, their words, and options that exclude each other."""

_WORDS = {
    "form": ("residual", "plain"),
    "gates_of": ("token", "chunk"),
    "init": ("learned", "zero"),
    "start": ("auto", "associative", "random"),
    "surprise_threshold_on": ("reconstruction", "prediction"),
}
RENAMED = {
    "heads": "num_heads",
    "depth": "layers",
    "hidden": "memory_dim",
    "theta_max": "lr",
    "theta_start": "lr_start",
    "threshold": "surprise_threshold",
    "threshold_on": "surprise_threshold_on",
}
"""Old names of options: the new ones are those of the configuration, without its prefix `memory_`."""


def head_width(dim: int, num_heads: int, names: tuple[str, str] = ("dim", "num_heads")) -> int:
    """The width of a head where none is given. Raises ValueError if the heads do not divide the width."""
    if num_heads > 0 and dim % num_heads:
        raise ValueError(f"{names[0]}={dim} is not a multiple of {names[1]}={num_heads}: change one, or give head_dim")
    return dim // max(num_heads, 1)


def check_options(*, counts: dict[str, int], rates: dict[str, float], words: dict[str, str]) -> None:
    """Raises ValueError for a count below 1, a rate outside (0, 1], a word that its option does not know, and an
    associative start without convolutions."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, rate in rates.items():
        if not 0 < rate <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {rate}")
    for name, word in words.items():
        if word not in _WORDS[name]:
            raise ValueError(f"{name} must be one of {', '.join(_WORDS[name])}, got {word!r}")
    if words["start"] == "associative" and counts["conv_size"] == 1:
        raise ValueError('start="associative" needs convolutions that look back: conv_size must be at least 2, got 1')
