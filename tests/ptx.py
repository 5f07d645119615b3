"""What Triton makes of a kernel for a GPU, which need not be there."""

import re
from typing import Any


def float_operations(kernel: Any, signature: dict[str, str], **constants: Any) -> set[str]:
    """Its operations on float32 for compute capability 9.0, without loads, stores and moves."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, kinds, constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    return set(re.findall(r"(?m)^\s*(?:@\S+\s+)?((?!mov|ld|st|selp)[a-z]+\.[\w.]*f32)\b", ptx))
