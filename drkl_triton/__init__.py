"""Softmax, reverse KL and DRKL for distilling language models, without ever holding a probability
tensor.
"""

import os

_root = os.path.dirname(__path__[0])
if not os.path.exists(os.path.join(__path__[0], "kernels")):  # a clone, where they lie beside it
    __path__.append(_root)

from . import objectives, reference  # noqa: E402
from ._version import __version__  # noqa: E402
from .algebra import RowMetrics  # noqa: E402
from .functional import *  # noqa: E402, F403
from .functional import __all__ as _functions  # noqa: E402
from .linear import *  # noqa: E402, F403
from .linear import __all__ as _linear_functions  # noqa: E402
from .modules import *  # noqa: E402, F403
from .modules import __all__ as _modules  # noqa: E402

__all__ = [
    "RowMetrics", "__version__", "objectives", "reference", *_functions, *_linear_functions,
    *_modules,
]  # fmt: skip
