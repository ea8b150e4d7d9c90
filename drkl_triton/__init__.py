"""Softmax, reverse KL and DRKL for distilling language models, without ever holding a probability
tensor.
"""

from . import reference
from ._version import __version__
from .algebra import RowMetrics
from .functional import drkl, log_softmax, reverse_kl, softmax
from .linear import linear_drkl, linear_reverse_kl
from .modules import DRKLLoss, LinearDRKLLoss, LinearReverseKLLoss, ReverseKLLoss

__all__ = [
    "DRKLLoss",
    "LinearDRKLLoss",
    "LinearReverseKLLoss",
    "ReverseKLLoss",
    "RowMetrics",
    "__version__",
    "drkl",
    "linear_drkl",
    "linear_reverse_kl",
    "log_softmax",
    "reference",
    "reverse_kl",
    "softmax",
]
