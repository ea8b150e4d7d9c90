"""Softmax, reverse KL, DRKL and the other divergences for distilling language models, without ever
holding a probability tensor.
"""

import os

_root = os.path.dirname(__path__[0])
if not os.path.exists(os.path.join(__path__[0], "kernels")):  # a clone, where they lie beside it
    __path__.append(_root)

from . import objectives, reference  # noqa: E402
from ._version import __version__  # noqa: E402
from .algebra import RowMetrics  # noqa: E402
from .functional import (  # noqa: E402
    adaptive_kl,
    alpha_beta,
    cross_entropy,
    divergence,
    dkd,
    drkl,
    forward_kl,
    js_divergence,
    log_softmax,
    mixed_kl,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    softmax,
    total_variation,
)
from .linear import linear_divergence, linear_drkl, linear_reverse_kl  # noqa: E402
from .modules import (  # noqa: E402
    DivergenceLoss,
    DRKLLoss,
    LinearDivergenceLoss,
    LinearDRKLLoss,
    LinearReverseKLLoss,
    ReverseKLLoss,
)
from .sparse import (  # noqa: E402
    SparseTeacher,
    linear_log_probs_at,
    log_probs_at,
    sampled_teacher,
    teacher_topk,
    union_ids,
)

__all__ = [
    "DRKLLoss",
    "DivergenceLoss",
    "LinearDRKLLoss",
    "LinearDivergenceLoss",
    "LinearReverseKLLoss",
    "ReverseKLLoss",
    "RowMetrics",
    "SparseTeacher",
    "__version__",
    "adaptive_kl",
    "alpha_beta",
    "cross_entropy",
    "divergence",
    "dkd",
    "drkl",
    "forward_kl",
    "js_divergence",
    "linear_divergence",
    "linear_drkl",
    "linear_log_probs_at",
    "linear_reverse_kl",
    "log_probs_at",
    "log_softmax",
    "mixed_kl",
    "objectives",
    "reference",
    "reverse_kl",
    "sampled_teacher",
    "skew_kl",
    "skew_reverse_kl",
    "softmax",
    "teacher_topk",
    "total_variation",
    "union_ids",
]
