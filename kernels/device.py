"""The functions of facts.py and of an objective's terms, compiled: written once, in what PyTorch
and Triton have in common.
"""

import dis
import os
import types
from collections import namedtuple
from functools import cache

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice
from triton.runtime import driver

from .. import facts
from .online_softmax import LOG2E

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@tl.core.builtin
def log2(x, _semantic=None):
    """One instruction on NVIDIA's GPUs, where triton.language's takes thirty. Its error, 2^-22
    around 1 and relative elsewhere, is that of the exponentials.
    """
    if x.dtype == tl.float32 and driver.active.get_current_target().backend == "cuda":
        return libdevice.fast_log2f(x, _semantic=_semantic)
    return tl.log2(x, _semantic=_semantic)


@triton.jit
def fast_exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def fast_log(x):
    if INTERPRETED:
        return tl.log2(x) * LN2
    else:
        return log2(x) * LN2


# What pointwise terms and ``skewed`` see as ``tl``: they are computed for every column.
fast = types.ModuleType("fast")
fast.exp, fast.log, fast.__getattr__ = fast_exp, fast_log, lambda name: getattr(tl, name)


@cache
def device_function(function, language=tl):
    """A copy of a function, as a device function that sees triton.language as ``tl``, the functions
    it calls as such copies, and numbers as constants.
    """
    names = {"triton_language": tl, "tl": language, "__name__": function.__module__}
    copy = types.FunctionType(function.__code__, names, function.__name__)
    copy.__annotations__ = function.__annotations__
    copy.__module__ = function.__module__
    loaded = (i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL")
    for name in dict.fromkeys(loaded):
        if name in function.__globals__:
            names[name] = _on_device(function.__globals__[name], language)
    return triton.jit(copy)


def _on_device(value, language):
    """What a device function sees in place of a global."""
    value = getattr(value, "function", value)  # a divergence
    if value is facts.tl:
        return language
    if isinstance(value, types.FunctionType):
        return device_function(value, language)
    if isinstance(value, int | float):
        return tl.constexpr(value)
    if isinstance(value, types.ModuleType):
        module = types.ModuleType(value.__name__)
        module.__getattr__ = lambda name: _on_device(getattr(value, name), language)
        return module
    if isinstance(value, type) and getattr(value, "_field_defaults", None) and not INTERPRETED:
        return _with_constants(value)
    return value  # a NamedTuple; Triton refuses anything else


@cache
def _with_constants(named_tuple):
    """With defaults that are constants: before 3.5 Triton takes no number from there."""
    constants = [tl.constexpr(number) for number in named_tuple._field_defaults.values()]
    return namedtuple(named_tuple.__name__, named_tuple._fields, defaults=constants)


losses = device_function(facts.losses)
weights = device_function(facts.weights)
gradient_bound = device_function(facts.gradient_bound)
float16_room = device_function(facts.float16_room)
pointwise = device_function(facts.pointwise)
normalised = device_function(facts.normalised)
floored = device_function(facts.floored)
skewed = device_function(facts.skewed, fast)
divided = device_function(facts.divided)


@cache
def compiled(terms):
    """The terms of an objective (facts.objective) with device functions."""
    return tuple((device_function(function), *places) for function, *places in terms)


@cache
def compiled_phis(phis):
    return tuple((device_function(function, fast), *places) for function, *places in phis)


@triton.jit
def load_parameters(ptr, stride, offset, COUNT: tl.constexpr, ACC: tl.constexpr):
    """A tuple; offset: of one row, or of several."""
    values = ()
    for k in tl.static_range(COUNT):
        values = values + (tl.load(ptr + k * stride + offset).to(ACC),)
    return values


def parameter_arguments(parameters):
    """(the table or None, how many, the strides) of parameters [P, N] or [P, 1]."""
    if parameters is None:
        return None, 0, 0, 0
    count, values = parameters.shape
    return parameters, count, parameters.stride(0), parameters.stride(1) if values > 1 else 0
