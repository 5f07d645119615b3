"""Updates of A and B by brute force."""

import torch
from torch import Tensor


def best(A: Tensor, B: Tensor, G: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Of all h_A and h_B with the least ‖s(B h_A + h_B A) − G‖, the nearest to g_A and g_B.

    One least-squares problem in the r(m + n) numbers of the change of g_A and g_B, of which LAPACK
    gives the shortest solution.
    """
    (m, r), n = B.shape, A.shape[1]
    g_A, g_B = s * B.t() @ G, s * G @ A.t()
    of_A = torch.kron(B.contiguous(), torch.eye(n, dtype=A.dtype))  # vec, row by row
    A_nr = A.t().clone(memory_format=torch.contiguous_format)
    of_B = torch.kron(torch.eye(m, dtype=A.dtype), A_nr)
    left = s * torch.cat([of_A, of_B], dim=1)
    missing = (G - s * (B @ g_A + g_B @ A)).reshape(-1, 1)
    change = torch.linalg.lstsq(left, missing, driver="gelsd", rcond=1e-12).solution[:, 0]
    return g_A + change[: r * n].view(r, n), g_B + change[r * n :].view(m, r)
