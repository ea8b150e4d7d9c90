"""Softmax, reverse KL and DRKL for distilling language models, without ever holding a probability
tensor.
"""

import os

_root = os.path.dirname(__path__[0])
if not os.path.exists(os.path.join(__path__[0], "kernels")):  # a clone, where they lie beside it
    __path__.append(_root)

from . import reference  # noqa: E402
from ._version import __version__  # noqa: E402
from .algebra import RowMetrics  # noqa: E402
from .functional import drkl, log_softmax, reverse_kl, softmax  # noqa: E402
from .linear import linear_drkl, linear_reverse_kl  # noqa: E402
from .modules import DRKLLoss, LinearDRKLLoss, LinearReverseKLLoss, ReverseKLLoss  # noqa: E402

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
