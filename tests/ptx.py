"""What Triton makes of a kernel for a GPU, which need not be there."""

import re
from typing import Any


def float_operations(kernel: Any, signature: dict[str, str], **constants: Any) -> set[str]:
    """Its arithmetic in float32, and its casts to bfloat16, for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, kinds, constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    wanted = r"\b((?:add|sub|mul|div|fma|mad|rcp)\.[\w.]*f32|cvt\.[\w.]*bf16\w*\.f32)\b"
    return set(re.findall(wanted, ptx))
