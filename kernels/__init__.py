"""Triton kernels of drkl-triton: row sums, row gradients, softmax. Installed as ``drkl_triton.kernels``.

Launchers take prepared arguments and check nothing; the checked entry points are in ``drkl_triton.functional``.
"""

from .row_grad import row_grad
from .row_sums import row_sums
from .softmax import softmax_backward, softmax_forward

__all__ = ["row_grad", "row_sums", "softmax_backward", "softmax_forward"]
