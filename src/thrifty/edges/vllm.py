"""LoRA folders for vLLM: whether it takes one, and the length dial as one folder per strength.

>>> from thrifty.edges.vllm import check_lora, export_strengths                   # doctest: +SKIP
>>> check_lora("run/adapter").faults                                              # doctest: +SKIP
>>> export_strengths("run/adapter", [0.25, 0.5, 1.0], "served")                   # doctest: +SKIP

``thrifty adapter check`` and ``thrifty adapter export`` do the same. ``vllm_controls`` has our controls as vLLM's
logits processors, ``thrifty.engines.vllm`` the offline engine; docs/vllm.md says what was run.
"""

from thrifty.engines._vllm_lora import (
    VERSION,
    Fault,
    LoraReport,
    check_lora,
    export_strength,
    export_strengths,
    serve_line,
)

__all__ = ["VERSION", "Fault", "LoraReport", "check_lora", "export_strength", "export_strengths", "serve_line"]
