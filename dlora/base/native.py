"""`dtype: auto`: bfloat16 where this machine multiplies in it natively, else float32.

Elsewhere bfloat16 is worse than nothing: a CPU widens both factors for each product, or computes
them element by element, many times slower than in float32.
"""

from __future__ import annotations

import os
import platform

import torch

AUTO_DTYPE = "auto"
NATIVE = ("bfloat16", "float32")  # what `auto` may become
# The values of oneDNN's ONEDNN_MAX_CPU_ISA below those with products in bfloat16. With one of them
# a CPU stands in for an older one, and oneDNN uses no newer instructions.
_OLDER = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


def native_dtype(device: str) -> str:
    """What `dtype: auto` is on this machine.

    Args:
        device: `"cuda"` or `"cpu"`.
    """
    return NATIVE[0] if multiplies_natively(device) else NATIVE[1]


def multiplies_natively(device: str) -> bool:
    """Whether this process's device has instructions that multiply in bfloat16.

    CUDA: compute capability 8.0 and above. x86: AMX or AVX512_BF16, unless ONEDNN_MAX_CPU_ISA keeps
    oneDNN from them (AVX512 alone widens to float32). Others: as torch reports (bf16 of Armv8.6).
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    most = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    if most.upper() in _OLDER:
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))


def has_kernels() -> bool:
    """Whether oneDNN has kernels for bfloat16 on this CPU, native or by widening its factors."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
