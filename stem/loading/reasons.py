"""What libraries say when weights do not fit, in one line."""

from __future__ import annotations


def reason_of(error: BaseException) -> str:
    """The reason that an error of diffusers', transformers' or peft's gives.

    Args:
        error: Error that the loading of weights raised.
    """
    if isinstance(error, NotImplementedError) and "meta tensor" in str(error):
        return "it lacks weights that the configuration has a place for"
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]!r}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
