"""What a `NeuralMemory` may be told: ranges and names, and what does not go together."""

_WORDS = {
    "form": ("residual", "plain"),
    "gates_of": ("token", "chunk"),
    "init": ("learned", "zero"),
    "start": ("auto", "associative", "random"),
    "threshold_on": ("reconstruction", "prediction"),
}


def check_options(counts: dict[str, int], steps: dict[str, float], words: dict[str, str]) -> None:
    """Raises ValueError for a count below 1, a step outside (0, 1], a word that is none of its option's, and a start
    that needs convolutions where there are none."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, step in steps.items():
        if not 0 < step <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {step}")
    for name, word in words.items():
        if word not in _WORDS[name]:
            raise ValueError(f"{name} must be one of {', '.join(_WORDS[name])}, got {word!r}")
    if words["start"] == "associative" and counts["conv_size"] == 1:
        raise ValueError('start="associative" needs convolutions that look back: conv_size must be at least 2, got 1')
