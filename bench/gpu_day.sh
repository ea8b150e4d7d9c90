#!/usr/bin/env bash
# Everything worth doing on a GPU, in under ten minutes and without a network: the tests that need
# one, the sweep for kernels/tuning.py, the benchmarks. What comes of it goes into FOLDER, eight
# files.
#
#   bench/gpu_day.sh FOLDER         on a machine with a GPU, PyTorch, Triton and numpy
#   bench/gpu_day.sh --dry FOLDER   without a GPU: the same way, tiny, in Triton's interpreter
#
# Exit status: 0 if every stage did its work, 1 if one failed, ran out of time or could not run,
# 2 if nothing was done. PYTHON chooses the interpreter, COMMIT names the sources where git cannot.
set -eu -o pipefail

# Seconds. A stage may also use what those before it have left over, and is stopped (Ctrl-C first,
# so that it writes what it has) when its time is up. GRACE is how long stopping may take.
INSTALL=30
TESTS=190
TUNE=150
BENCH=130
LINEAR=60
GRACE=6
# A GPU day ends after INSTALL + TESTS + TUNE + BENCH + LINEAR + 5 GRACE = 590 at the latest.

# The most important first: where time runs out, the end is missing.
BENCH_ARGS=(--op drkl reverse_kl --vocab 128256 32000 50257 262144 --repeats 10)
# torch.compile, at each shape anew, would take most of the time
LINEAR_ARGS=(--op drkl reverse_kl --repeats 5
    --providers products dense tiled triton recompute liger trl)
TUNE_ARGS=()
# The tests run beside each other, since compiling takes longer than running, in these parts:
KERNELS=tests/test_gpu_kernels.py
PARTS=(
    "$KERNELS::TestNumericsOnTheCard"
    "$KERNELS::TestEdgesOnTheCard"
    "$KERNELS::TestWalkOnTheCard"
)

DRY=false
if [ "${1-}" = --dry ]; then
    DRY=true
    shift
    # 150 seconds at most; without obstacles it is 20
    INSTALL=20 TESTS=30 TUNE=25 BENCH=30 LINEAR=30 GRACE=3
    BENCH_ARGS=(--device cpu --op drkl --vocab 1000 --tokens 8 --repeats 1 --copy-mb 4
        --dtype float32 --providers dense tiled triton)
    LINEAR_ARGS=(--device cpu --op drkl --vocab 1000 --tokens 8 --hidden 16 --repeats 1
        --providers products dense tiled triton)
    TUNE_ARGS=(--device cpu --vocab 2100 --tokens 2 --repeats 1)
    PARTS=()
fi
if [ $# -ne 1 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: bench/gpu_day.sh [--dry] FOLDER" >&2
    exit 2
fi

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
PYTHON=$(command -v "${PYTHON:-python3}")
case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
SUMMARY=$OUT/summary.txt
TRITON_INTERPRET=0
if $DRY; then TRITON_INTERPRET=1; fi
export TRITON_INTERPRET PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MPLBACKEND=Agg
export PYTHONPATH="$WORK/site${PYTHONPATH:+:$PYTHONPATH}"

rm -f "$OUT"/{summary,tests,tune,bench,linear}.txt "$OUT"/{tune,bench,linear}.csv
: >"$WORK/stages"
say() { echo "gpu_day: $*" >&2; }

# --- where it runs ---

where() {
    if $DRY; then
        echo "DRY RUN. No GPU was used, and no time in this folder is a GPU's: the kernels ran in Triton's"
        echo "interpreter, on tiny sizes, to see that the stages work."
        echo
    fi
    echo "date      $(date -u +%Y-%m-%dT%H:%MZ)"
    echo "command   bench/gpu_day.sh $(if $DRY; then echo '--dry '; fi)FOLDER"
    echo "commit    $COMMIT"
    echo "sources   $(sources)"
    if $DRY; then
        echo "card      none"
    else
        echo "card      $(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit \
            --format=csv,noheader 2>/dev/null || echo 'nvidia-smi says nothing')"
    fi
    echo "host      $(nproc) cores, $(uname -sm)"
    "$PYTHON" - <<'PY'
import importlib, platform

print("python   ", platform.python_version())
for name in ("torch", "triton", "numpy", "pytest", "tqdm"):
    try:
        print(f"{name:9}", importlib.import_module(name).__version__)
    except Exception as error:
        print(f"{name:9} none ({type(error).__name__}: {error})")
PY
}

commit() {
    local id
    id=$(git -C "$ROOT" rev-parse --short=12 HEAD 2>/dev/null) || { echo unknown && return; }
    if [ -n "$(git -C "$ROOT" status --porcelain -- ':!bench/results' 2>/dev/null)" ]; then
        id+=-dirty
    fi
    echo "$id"
}

# One number for the files that decide: it tells two trees apart where there is no git.
sources() {
    (cd "$ROOT" && cat drkl_triton/*.py kernels/*.py bench/*.py bench/*.sh tests/*.py |
        sha256sum | cut -c1-16)
}

COMMIT=${COMMIT:-$(commit)}

# --- stages ---

# note NAME STATUS TEXT: one line of the summary, which is written anew, so that it is always there
note() {
    printf '%-8s %-10s %4ss of %4ss  %s\n' "$1" "$2" "$TOOK" "$GIVEN" "$3" >>"$WORK/stages"
    { cat "$WORK/where" && echo && cat "$WORK/stages"; } >"$SUMMARY"
    say "$1: $2. $3"
}

# budget SECONDS: what the coming stage has, with what was left over. Sets GIVEN and starts TOOK.
DUE=0
budget() {
    DUE=$((DUE + $1 + GRACE))
    GIVEN=$((DUE - GRACE - SECONDS))
    if [ "$GIVEN" -lt 1 ]; then GIVEN=1; fi # 0 would be without a limit
    STARTED=$SECONDS
    TOOK=0
}

# stage LOG COMMAND...: runs it in the folder IN. 0, the command's status, or 124 where its time was up
IN=$OUT
stage() {
    local log=$1 status=0
    shift
    (cd "$IN" && timeout --signal=INT --kill-after="$GRACE" "$GIVEN" "$@") >>"$log" 2>&1 || status=$?
    TOOK=$((SECONDS - STARTED))
    if [ "$status" -eq 137 ]; then status=124; fi
    return "$status"
}

rows() { awk 'END { print (NR ? NR - 1 : 0) " rows" }' "$1" 2>/dev/null || echo "no rows"; }

# conclude NAME STATUS TEXT
conclude() {
    case $2 in
    0) note "$1" ok "$3" ;;
    124) note "$1" "cut off" "its time was up; kept: $3" ;;
    *) note "$1" FAILED "exit status $2; $3" ;;
    esac
}

# Runs the tests or a benchmark. Ctrl-C reaches it also where the shell was told to ignore it;
# what the benchmarks want and can do without is stood in for.
cat >"$WORK/start.py" <<'PY'
import runpy, signal, sys
from importlib.machinery import ModuleSpec
from types import ModuleType

signal.signal(signal.SIGINT, signal.default_int_handler)
what, *arguments = sys.argv[1:]
if what == "pytest":
    import pytest

    sys.path.pop(0)
    sys.exit(pytest.main(arguments))


class Bar:
    __init__ = update = set_description_str = lambda *_, **__: None
    __enter__ = lambda self: self
    __exit__ = lambda *_: None


def stand_in(name, **contents):
    module = sys.modules[name] = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # torch.compile asks for it
    vars(module).update(contents)


sys.path[0] = what.rpartition("/")[0]
for name in ("plots", "linear_plots"):
    stand_in(name, draw=lambda *_: [])  # no files but the CSV
try:
    import tqdm
except ImportError:
    stand_in("tqdm", tqdm=Bar)
sys.argv = [what, *arguments]
runpy.run_path(what, run_name="__main__")
PY

install_stage() {
    local how="pip install --no-deps --no-build-isolation" status=0
    budget "$INSTALL"
    # A copy, because building leaves files behind
    mkdir -p "$WORK/source"
    (cd "$ROOT" && cp -r setup.py pyproject.toml README.md LICENSE drkl_triton kernels "$WORK/source")
    stage "$WORK/install.txt" "$PYTHON" -m pip install --no-deps --no-build-isolation --no-index \
        --disable-pip-version-check --target "$WORK/site" "$WORK/source" || status=$?
    if [ "$status" -ne 0 ]; then
        how="pip could not ($(grep -v '^ *$' "$WORK/install.txt" | tail -1)); copied as setup.py maps it"
        rm -rf "$WORK/site"
        mkdir -p "$WORK/site"
        cp -r "$ROOT/drkl_triton" "$WORK/site/"
        cp -r "$ROOT/kernels" "$WORK/site/drkl_triton/kernels"
    fi
    if stage "$WORK/install.txt" "$PYTHON" -c "
import sys, drkl_triton, drkl_triton.kernels
sys.exit(not drkl_triton.kernels.__file__.startswith(sys.argv[1]))" "$WORK/site"; then
        note install ok "$how"
    else
        note install FAILED "$(tail -1 "$WORK/install.txt")"
        return 1
    fi
}

# pytest's own last line, of each part
verdicts() {
    sed -n -E 's/^=* ?([0-9]+ [a-z]+.* in [0-9.]+s).*$/\1/p' "$OUT/tests.txt" | paste -sd+ - |
        sed 's/+/ + /g'
}

tests_stage() {
    local part files status=0 worst=0 pids=() i
    budget "$TESTS"
    if ! "$PYTHON" -c 'import pytest' 2>/dev/null; then
        echo "pytest is not installed: no test ran" >"$OUT/tests.txt"
        note tests "not run" "pytest is not installed"
        $DRY
        return
    fi
    mapfile -t files < <(cd "$ROOT" && grep -lE 'mark\.gpu' tests/*.py)
    PARTS=("${files[*]}" ${PARTS[@]+"${PARTS[@]}"})
    for i in "${!PARTS[@]}"; do
        read -ra part <<<"${PARTS[$i]}"
        # the first part is everything that no other part names
        if [ "$i" = 0 ] && [ ${#PARTS[@]} -gt 1 ]; then part+=(-k "not OnTheCard"); fi
        IN=$ROOT stage "$WORK/tests.$i" "$PYTHON" "$WORK/start.py" pytest -p no:cacheprovider \
            -m gpu -v --durations=10 --color=no "${part[@]}" &
        pids+=($!)
    done
    for i in "${!pids[@]}"; do
        status=0
        wait "${pids[$i]}" || status=$?
        if [ "$status" -gt "$worst" ]; then worst="$status"; fi
        { echo "### ${PARTS[$i]}" && cat "$WORK/tests.$i"; } >>"$OUT/tests.txt"
    done
    TOOK=$((SECONDS - STARTED))
    if $DRY && [ "$worst" -eq 0 ]; then
        note tests "not run" "no GPU: $(verdicts)"
    elif [ "$worst" -eq 0 ] && ! grep -q '[0-9] passed' "$OUT/tests.txt"; then
        note tests FAILED "none ran: $(verdicts)"
        worst=1
    else
        conclude tests "$worst" "$(verdicts)"
    fi
    return "$worst"
}

tune_stage() {
    local status=0
    budget "$TUNE"
    stage "$OUT/tune.txt" "$PYTHON" "$ROOT/bench/tune.py" --seconds "$GIVEN" --out tune.csv \
        ${TUNE_ARGS[@]+"${TUNE_ARGS[@]}"} || status=$?
    conclude tune "$status" "$(rows "$OUT/tune.csv") in tune.csv, what they come to in tune.txt"
    return "$status"
}

# suite NAME SCRIPT SECONDS ARGUMENT...: one of the benchmarks, into NAME.csv and NAME.txt
suite() {
    local name=$1 script=$2 status=0
    budget "$3"
    shift 3
    stage "$OUT/$name.txt" "$PYTHON" "$WORK/start.py" "$ROOT/bench/$script" \
        --out . --name "$name" "$@" || status=$?
    conclude "$name" "$status" "$(rows "$OUT/$name.csv") in $name.csv, tables in $name.txt"
    return "$status"
}

bench_stage() { suite bench run.py "$BENCH" "${BENCH_ARGS[@]}"; }

linear_stage() { suite linear linear.py "$LINEAR" "${LINEAR_ARGS[@]}"; }

# --- the day ---

SECONDS=0
where >"$WORK/where"
FAILED=0
if ! $DRY && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    { cat "$WORK/where" && echo && echo "nothing ran: PyTorch sees no GPU here"; } >"$SUMMARY"
    say "PyTorch sees no GPU here; bench/gpu_day.sh --dry FOLDER does without"
    exit 2
fi
if install_stage; then
    tests_stage || FAILED=1
    tune_stage || FAILED=1
    bench_stage || FAILED=1
    linear_stage || FAILED=1
else
    FAILED=1
fi
rm -f "$OUT"/*.csv.part
{
    echo
    echo "whole    ${SECONDS}s, exit status $FAILED"
    if [ -s "$OUT/tests.txt" ] && grep -qE '^(FAILED|ERROR) ' "$OUT/tests.txt"; then
        echo && grep -E '^(FAILED|ERROR) ' "$OUT/tests.txt"
    fi
    if ! $DRY && [ -s "$OUT/tune.txt" ]; then echo && sed -n '/^Proposed for/,/^device /p' "$OUT/tune.txt"; fi
} >>"$SUMMARY"
say "$SUMMARY"
exit "$FAILED"
