"""thrifty makes language models reason for less. Start with ``thrifty.contracts``."""

from typing import Any

__all__ = ["ThriftyError", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy, so that `import thrifty` does not pay for numpy.
    if name == "ThriftyError":
        from thrifty.contracts import ThriftyError

        return ThriftyError
    raise AttributeError(f"module 'thrifty' has no attribute {name!r}")
