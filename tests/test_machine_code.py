"""bench/machine_code.py: that it counts right, that the kernels keep within its limits, and that it
finds a kernel that does not.
"""

import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import selection
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from drkl_triton import kernels

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
sys.path.append(str(BENCH))  # as `python bench/machine_code.py` would have it
sass, machine_code = (importlib.import_module(name) for name in ("sass", "machine_code"))


# Triton 3.4's wheel has no linker for AMD's GPUs.
LINKS_AMD = tuple(map(int, triton.__version__.split(".")[:2])) > (3, 4)


# --- counting, by hand ---

# A tile: 32 threads, each with one 16-byte load of 8 columns of 2 bytes.
ONE_LOAD = sass.Geometry(lanes=32, vec=8, threads=32, warp=32, column_bytes=2)


def assemble(source):
    """cuobjdump's form of lines `label: instruction`, with addresses for the labels."""
    lines = [re.fullmatch(r"(?:(\w+):)?\s*(.+)", line.strip()) for line in source.split("\n")]
    lines = [line for line in lines if line]
    at = {line[1]: f"0x{16 * i:x}" for i, line in enumerate(lines) if line[1]}
    text = [
        re.sub(r"\b[a-z]\w+\b", lambda name: at.get(name[0], name[0]), line[2]) for line in lines
    ]
    return "\n".join(
        f"        /*{16 * i:04x}*/    {line} ;    /* 0x00 */" for i, line in enumerate(text)
    )


FAST_AND_CAREFUL = """
           LDC R1, c[0x0][0x28]
           @P0 BRA ignored
           @P1 BRA short
           MUFU.EX2 R4, R4
           FADD R4, R4, R4
    short: @P2 BRA after
    loop:  LDG.E.128 R8, desc[UR4][R2.64]
           @P3 FADD R8, R8, R8
           MUFU.EX2 R8, R8
           @P4 BRA loop
    after: @P0 LDG.E.128 R8, desc[UR4][R2.64]
           BRA.U !UP0, careful
    end:   BAR.SYNC.DEFER_BLOCKING 0x0
           @P0 CALL.REL.NOINC far
           NOP
    far:   EXIT
    careful: @P2 BRA merge
    again: LDG.E.128 R8, desc[UR4][R2.64]
           MUFU.EX2 R8, R8
           MUFU.EX2 R8, R8
           FADD R8, R8, R8
           FADD R8, R8, R8
           @P4 BRA again
    merge: FADD R8, R8, R8
           FADD R8, R8, R8
           BRA end
    ignored: STG.E.128 desc[UR4][R2.64], RZ
           @P4 BRA ignored
           EXIT
"""


def test_two_loops_and_a_branch_by_hand():
    program = sass.Program(sass.parse_sass(assemble(FAST_AND_CAREFUL)))
    assert [len(loop.blocks) for loop in program.loops] == [1, 1, 1]
    main = sass.main_loop(program, ONE_LOAD)
    assert program.blocks[main.header][0].address == 6 * 16
    # Six instructions down to the loop, the longer side of the branch among them; four for each of
    # five tiles; the masked tile, the branch, the barrier, the call that is a jump and the longer
    # way on, the exit. Nothing of what is careful, its last three lines included, nor of the
    # ignored row.
    assert sass.executed(program, ONE_LOAD, 5) == sass.Count(6 + 5 * 4 + 6, 1 + 5)


UNROLLED = """
           CALL.REL.NOINC divide
           @P0 BRA rest
    loop:  LDG.E.128 R8, desc[UR4][R2.64]
           LDG.E.128 R12, desc[UR4][R2.64]
           MUFU.EX2 R8, R8
           MUFU.EX2 R9, R9
           @P1 BRA loop
    rest:  @P2 BRA after
           MOV R3, R4
    one:   LDG.E.128 R8, desc[UR4][R2.64]
           MUFU.EX2 R8, R8
           FADD R8, R8, R8
           @P3 BRA one
    after: @P0 LDG.E.128 R8, desc[UR4][R2.64]                 &req={0} ?WAIT1
           @P0 EXIT                                           &req={0}
           STG.E desc[UR4][R2.64], R8
           EXIT
    divide: @P5 BRA back
           MOV R5, R6
    back:  RET.REL.NODEC R20 0x0
    hang:  BRA hang   &req={1}
"""


def test_an_unrolled_loop_its_remainder_and_a_call_by_hand():
    program = sass.Program(sass.parse_sass(assemble(UNROLLED)))
    # The call, three in the function, the branch; trips of five for two tiles; the remainder's
    # guard; the masked tile, the exit not taken, the store, the exit.
    assert sass.executed(program, ONE_LOAD, 6) == sass.Count(1 + 3 + 1 + 3 * 5 + 1 + 4, 3 * 2)
    # One tile more: the remainder's four, and the one instruction that leads to it.
    assert sass.executed(program, ONE_LOAD, 7) == sass.Count(25 + 1 + 4, 3 * 2 + 1)


APART = """
           @P0 BRA other
    loop:  LDG.E.128 R8, desc[UR4][R2.64]
           LDG.E.128 R12, desc[UR4][R2.64]
           MUFU.EX2 R8, R8
           MUFU.EX2 R9, R9
           @P1 BRA loop
           @P2 LDG.E.128 R8, desc[UR4][R2.64]
           STG.E desc[UR4][R2.64], R8
           EXIT
    other: LDG.E.128 R8, desc[UR4][R2.64]
           MUFU.EX2 R8, R8
           @P3 BRA other
           STG.E desc[UR4][R2.64], R8
           EXIT
"""


def test_a_loop_on_another_branch_is_no_remainder_by_hand():
    program = sass.Program(sass.parse_sass(assemble(APART)))
    # The branch, trips of five for two tiles, the masked tile, the store, the exit.
    assert sass.executed(program, ONE_LOAD, 6) == sass.Count(1 + 3 * 5 + 3, 3 * 2)
    # One tile more takes another trip.
    assert sass.executed(program, ONE_LOAD, 7) == sass.Count(1 + 4 * 5 + 3, 4 * 2)


def test_the_main_loop_is_the_cheapest_for_a_tile_and_of_nearly_equal_ones_the_widest():
    def loop(name, loads, others):
        lines = ["LDG.E.128 R8, [R2]"] * loads + ["FADD R8, R8, R8"] * others
        return "\n".join([f"{name}: {lines[0]}", *lines[1:], f"@P0 BRA {name}"])

    # 10 instructions a tile, 10.5 and 16
    source = [loop("one", 1, 8), loop("two", 2, 18), loop("four", 4, 59), "EXIT"]
    program = sass.Program(sass.parse_sass(assemble("\n".join(source))))
    main = sass.main_loop(program, ONE_LOAD)
    assert [len(program.blocks[i]) for i in main.trip] == [21]


AMDGCN = """
kernel:                                 ; @kernel
.Lfunc_begin0:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_3
; %bb.1:
	v_exp_f32_e32 v1, v1
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
.Ltmp1:
	s_cmp_eq_u32 s4, s5
	s_cbranch_scc1 .LBB0_3
	buffer_load_dwordx4 v[4:7], v0, s[4:7], 0 offen
	v_exp_f32_e32 v4, v4
	s_branch .LBB0_2
.LBB0_3:
	buffer_load_dwordx4 v[4:7], v0, s[4:7], 0 offen
	s_barrier
	buffer_store_short v4, v0, s[4:7], 0 offen
	s_endpgm
"""


def test_amd_and_a_loop_tested_at_its_top_by_hand():
    program = sass.Program(sass.parse_amdgcn(AMDGCN))
    # Three before the loop; trips of five; the test that ends it, two; four after it.
    assert sass.executed(program, ONE_LOAD, 4) == sass.Count(3 + 4 * 5 + 2 + 4, 1 + 4)
    # The masked tile column by column: eight loads instead of one.
    wide = "\tbuffer_load_dwordx4 v[4:7], v0, s[4:7], 0 offen\n"
    head, _, tail = AMDGCN.rpartition(wide)
    narrow = wide.replace("dwordx4", "ushort") * 8
    columns = sass.Program(sass.parse_amdgcn(head + narrow + tail))
    assert sass.executed(columns, ONE_LOAD, 4) == sass.Count(3 + 4 * 5 + 2 + 11, 1 + 4)
    assert [c.store_bits for c in program.code if c.store_bits] == [16]
    assert sum(c.is_barrier for c in program.code) == 1


@pytest.mark.parametrize(
    "line, load, store",
    [
        ("LDG.E.128 R4, desc[UR4][R2.64]", 128, 0),
        ("@!P0 LDG.E.U16.CONSTANT R4, desc[UR4][R2.64+0x2]", 16, 0),
        ("LDG.E R4, desc[UR4][R2.64]", 32, 0),
        ("LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64]", 256, 0),
        ("LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]", 128, 0),
        ("@P1 STG.E.64 desc[UR4][R2.64], R4", 0, 64),
        ("LDS.128 R4, [R2]", 0, 0),
    ],
)
def test_widths(line, load, store):
    (instruction,) = sass.parse_sass(assemble(line))
    assert (instruction.load_bits, instruction.store_bits) == (load, store)


def test_spills_are_a_threads_own_memory():
    code = sass.parse_sass(
        assemble("LDL R1, [R2]\n@P0 STL.64 [R2], R4\nLDG.E R4, [R2]\nLDS R1, [R2]")
    )
    code += sass.parse_amdgcn("\tscratch_load_dword v0, off, s0\n\tds_read_b32 v0, v1\n")
    assert [c.is_spill for c in code] == [True, True, False, False, True, False]


def test_what_cannot_be_followed_is_an_error():
    with pytest.raises(ValueError, match="BRX"):
        sass.parse_sass(assemble("BRX R4 -0x10\nEXIT"))
    with pytest.raises(ValueError, match="entered in two places"):
        sass.Program(
            sass.parse_sass(assemble("@P0 BRA two\none: NOP\ntwo: NOP\n@P1 BRA one\nEXIT"))
        ).walk()


def test_full_tiles_of_the_row_that_has_most():
    geometry = sass.Geometry(lanes=4, vec=8, threads=4, warp=4, column_bytes=2)
    # 97 columns of 2 bytes: rows start at any column of a vector. From column 0 or 1 of the first
    # whole vector there are 12 vectors, three tiles; from any later one 11.
    assert sass.full_tiles(97, 2, geometry) == 3
    assert sass.full_tiles(95, 2, geometry) == 2


# --- counting, on a kernel of known content ---

EXPONENTIALS = """
import json, sys
sys.path.append(sys.argv[1])
import machine_code, sass, torch, triton, triton.language as tl

@triton.jit(do_not_specialize=["tiles"])
def exp_kernel(x_ptr, y_ptr, tiles):
    offs = tl.arange(0, 1024)
    for i in range(tiles):
        tl.store(y_ptr + i * 1024 + offs, tl.exp2(tl.load(x_ptr + i * 1024 + offs)))

found = {}
geometry = sass.Geometry(lanes=256, vec=4, threads=128, warp=32, column_bytes=4)
x = torch.empty(4096)
for target in sys.argv[2:]:
    with machine_code.compiling(target) as launched:
        exp_kernel[(1,)](x, x, 4, num_warps=128 // machine_code.TARGETS[target].warp_size)
    (kernel, flags), = launched.values()
    program = machine_code.read(kernel).program
    counts = [sass.executed(program, geometry, tiles) for tiles in (99, 199)]
    (loop,) = {sass.main_loop(program, geometry)}
    bits = {c.load_bits for c in program.instructions(loop.trip) if c.load_bits}
    found[target] = [[c.instructions, c.exponentials] for c in counts], sorted(bits)
print(json.dumps(found))
"""


def compile_with(arguments, folder, path=""):
    """Run Python where Triton compiles; its results are kept in ``folder``, not in the home."""
    env = dict(os.environ, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(folder / "cache"))
    env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=env, cwd=folder, capture_output=True, text=True
    )


def test_a_kernel_that_can_be_counted_by_eye(tmp_path):
    script = tmp_path / "exponentials.py"
    script.write_text(EXPONENTIALS)
    targets = ["sm_90", "gfx942"] if LINKS_AMD else ["sm_90"]
    run = compile_with([script, BENCH, *targets], tmp_path)
    assert run.returncode == 0, run.stderr
    for (few, many), bits in json.loads(run.stdout).values():
        # 8 columns a thread. No tile is masked outside the loop, so one more is left to it.
        assert (few[1], many[1]) == (8 * 100, 8 * 200)
        # For each 4 columns a load, a store, and around each exponential at most three more
        # (denormal numbers are scaled); then the counter, the branch and the addresses.
        assert 8 + 4 <= (many[0] - few[0]) / 100 <= 8 * 4 + 4 + 12
        assert bits == [128]


# --- the kernels ---


def report(folder, *arguments, path=""):
    """(exit status, what it printed, the CSV's rows)."""
    output = folder / "machine_code.csv"
    command = [BENCH / "machine_code.py", *arguments, "--output", output]
    run = compile_with(command, folder, path)
    assert output.exists(), run.stdout + run.stderr
    with output.open(newline="", encoding="utf-8") as file:
        return run.returncode, run.stdout + run.stderr, list(csv.DictReader(file))


@pytest.mark.parametrize(
    "part", ["--target sm_90", "--kernel softmax", "--case plain", "--vocab 50257"]
)
def test_a_part_does_not_replace_the_table(part, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    whole = machine_code.parse([]).output
    assert whole == BENCH / "results" / "machine_code.csv"
    assert machine_code.parse(part.split()).output is None
    assert machine_code.parse([*part.split(), "--output", "x.csv"]).output == Path("x.csv")


# A part of what `python bench/machine_code.py` compiles, which takes many minutes.
GRID = {
    "sm_90": "--vocab 128256 --dtype bfloat16 --case plain splits".split(),
    "sm_100": "--vocab 128256 --dtype bfloat16 --case plain support".split(),
    "sm_80": "--vocab 50257 --dtype float32 --case plain mixed".split(),
    "sm_120": "--vocab 50257 --dtype float32 --case plain float64".split(),
    "gfx942": "--vocab 50257 --dtype float32 --case plain".split(),
}
# On the other targets one of the objectives, or some.
OTHERS = {*machine_code.OBJECTIVES} - {*(machine_code.VARIED if selection.ALL else ["reverse_kl"])}
COMMON = [
    name
    for name in machine_code.KERNELS
    if not any(name in machine_code.loss_kernels(objective) for objective in OTHERS)
]


@pytest.mark.slow
@pytest.mark.parametrize("target", [target for target in GRID if LINKS_AMD or target != "gfx942"])
def test_every_kernel_compiles_and_keeps_its_limits(target, tmp_path):
    kernels = [] if target == "sm_90" else ["--kernel", *COMMON]
    status, printed, rows = report(tmp_path, "--target", target, *GRID[target], *kernels)
    assert status == 0, printed
    assert "BROKEN" not in printed
    wanted = {*machine_code.KERNELS} if target == "sm_90" else {*COMMON}
    if "splits" not in GRID[target]:  # nothing to merge
        wanted -= {"merge_sums"}
    if GRID[target][-1] == "plain":
        wanted -= {*machine_code.ROW_MAPS}
    whole = {name for name, parts in machine_code.LOSSES.items() if wanted >= {*parts}}
    assert {row["kernel"] for row in rows} == wanted | whole
    plain = [row for row in rows if row["case"] == "plain"]
    counted = [row for row in plain if row["kernel"] == machine_code.LOSS_NAME]
    assert len(counted) == 1
    for row in counted:  # at least a multiplication for every exponential, and a load
        assert 2.9 < float(row["exponentials"]) < float(row["instructions"]) / 2
    walks = [row for row in rows if row["kernel"] in {*machine_code.LOSS, *machine_code.SOFTMAX}]
    assert all(row["load_bits"] and int(row["registers"]) > 10 for row in walks)


@pytest.mark.slow
def test_a_mask_on_columns_and_what_does_not_compile_turn_the_report_red(tmp_path):
    package = tmp_path / "changed" / "drkl_triton"
    shutil.copytree(ROOT / "drkl_triton", package)
    shutil.copytree(ROOT / "kernels", package / "kernels")
    walk = package / "kernels" / "row_walk.py"
    # Every load without a mask gets one that can differ from column to column.
    text, changed = re.subn(
        r"tl\.load\(([^=]+?)\)$",
        r"tl.load(\1, mask=(\1).to(tl.int64) % 4096 != 0, other=0)",
        walk.read_text(),
        flags=re.M,
    )
    assert changed
    walk.write_text(text)
    softmax = package / "kernels" / "softmax.py"
    assert "tl.exp2(" in softmax.read_text()
    softmax.write_text(softmax.read_text().replace("tl.exp2(", "tl.no_such_function(", 1))
    wanted = "--target sm_90 --vocab 50257 --dtype float32 --case plain".split()
    wanted += ["--kernel", *machine_code.LOSS, "softmax_sums"]
    status, printed, rows = report(tmp_path, *wanted, path=package.parent)
    assert status == 1, printed
    for name in machine_code.LOSS:
        (row,) = [row for row in rows if row["kernel"] == name]
        assert "32-bit loads in the loop, not 128" in row["limits"]
        assert f"BROKEN {name}, sm_90, V=50,257, float32" in printed
    (row,) = [row for row in rows if row["kernel"] == "softmax_sums"]
    assert "no_such_function" in row["limits"]


def test_limits():
    row = {"kernel": "row_sums", "spills": 0, "barriers": 0, "aligned": True, "load_bits": "128"}
    loss = {
        "kernel": machine_code.LOSS_NAME,
        "vocab": 128256,
        "instructions": 30.0,
        "exponentials": 3.3,
    }

    def broken(row, target="sm_90", **changes):
        return machine_code.broken(row | changes, target)

    assert broken(row) == broken(loss) == []
    assert broken(row, spills=2) == ["2 spilling loads and stores, 2 over 0"]
    assert broken(row, spills=2, target="gfx942")
    assert broken(row, barriers=1) == ["1 barriers in the loop, 1 over 0"]
    assert broken(row, load_bits="16/32/128") == ["16- and 32-bit loads in the loop, not 128"]
    assert broken(row, store_bits="64") == ["64-bit stores in the loop, not 128"]
    assert broken(row, load_bits="16", aligned=False) == []
    assert broken(row, load_bits="16", target="gfx942") == []
    assert broken(row, load_bits="256") == []
    assert broken(row, error="TypeError: no") == ["TypeError: no"]
    assert broken(loss, instructions=30.5) == ["30.5 instructions an element, 0.5 over 30"]
    assert broken(loss, instructions=30.5, vocab=50257) == []
    assert broken(loss, instructions=29.5, target="sm_100")
    assert broken(loss, instructions=99.0, target="sm_80") == []
    assert broken(loss, exponentials=3.5, target="gfx942")


def test_the_stand_in_is_gone_afterwards():
    before = vars(driver).copy(), JITFunction.run, kernels.tuning._device_shape
    with pytest.raises(ZeroDivisionError), machine_code.compiling("gfx942"):
        assert driver.active.get_current_target().arch == "gfx942"
        _ = 1 / 0
    assert (vars(driver), JITFunction.run, kernels.tuning._device_shape) == before


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        machine_code.main(["--vocab", "50257"])
    assert "TRITON_INTERPRET" in capsys.readouterr().err
