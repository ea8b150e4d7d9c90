"""Compile every kernel for GPUs that are not there, a line for each. Run by test_compile.py.

A stand-in driver names the target; ``warmup=True`` compiles what a launch would, and launches
nothing. The interpreter, in which the other tests run, accepts much that the compiler does not.
"""

import re
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class StandIn:
    target = None

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return self.target

    def get_device_interface(self):
        return torch.cuda


def compile_only(self, grid):
    def launch(*args, **kwargs):
        kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
        wide = len(re.findall(r"ld\.global\S*\.v4\.b32|global_load_dwordx4", str(kernel.asm)))
        types = "/".join(str(x.dtype)[6:] for x in args[:2] if isinstance(x, torch.Tensor))
        flags = " ".join(f"{k}={v}" for k, v in kwargs.items() if k in ("ALIGNED", "LOG"))
        print(target, self.__name__, types, flags, "wide_loads", wide, flush=True)

    return launch


JITFunction.__getitem__ = compile_only
stand_in = StandIn()
driver.set_active(stand_in)

from drkl_triton import kernels  # noqa: E402
from drkl_triton._layout import rows_of  # noqa: E402


def launch_all(student, teacher, **flags):
    N, V = student.shape
    acc = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    one, label = torch.ones((), dtype=acc), torch.zeros(N, dtype=torch.int64)
    s, t = rows_of(student), rows_of(teacher)
    kernels.row_sums(s, t, label, one, V, entropy=flags.get("teacher_support", False), **flags)
    kernels.row_grad(s, t, label, one, torch.empty(7, N, dtype=acc), V, **flags)


def launch_softmax(x):
    N, V = x.shape
    one = torch.ones((), dtype=torch.promote_types(x.dtype, torch.float32))
    for log in (False, True):
        y, state = kernels.softmax_forward(rows_of(x), one, N, log=log)
        kernels.softmax_backward(rows_of(x), rows_of(y), one, state, log=log)


for target in sys.argv[1:]:
    stand_in.target = TARGETS[target]
    kernels.tuning.DEFAULT_DEVICE = (132, TARGETS[target].warp_size)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        # odd and many rows: one program a row
        x, t = torch.empty(600, 5025, dtype=dtype), torch.empty(600, 5025, dtype=dtype)
        launch_all(x, t)
        launch_softmax(x)
    # rows that lie differently, few rows (splits and the merge), and the other flags
    launch_all(x.bfloat16()[:, 1:], t.float()[:, 1:])
    launch_all(x.bfloat16()[:3].repeat(1, 9), t.bfloat16()[:3].repeat(1, 9), teacher_support=True)
