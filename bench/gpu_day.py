"""Everything worth doing on a GPU, the most important first, in 480 seconds and without a network.

    bench/gpu_day.sh FOLDER                  on a machine with a GPU, PyTorch and Triton
    bench/gpu_day.sh --second FOLDER         again after mending, in 230 seconds
    bench/gpu_day.sh --only headline FOLDER  some stages, named
    bench/gpu_day.sh --dry FOLDER            no GPU: the same steps, tiny, on a pretend CUDA
    bench/gpu_day.sh --pack                  before: what a machine without network and git needs

FOLDER gets summary.txt and results.tar.gz (all CSVs and logs), anew after every step and every ten
seconds between. A step that is not done when its time is up gets Ctrl-C, then is killed; it may
also use what those before it left over. Exit status: 0 if every step did its work, 1 if one did
not, 2 if there is no GPU. --pack writes .day/: the commit's name and Liger's wheel; carry it along.
"""

import argparse
import csv
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

START = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
BENCH, PACKED = ROOT / "bench", ROOT / ".day"
GRACE = 3  # seconds between Ctrl-C and the end
# Six numbers of columns: one of no factor 8, one padded to it
VOCABULARIES = "128256 32000 50257 151936 50304 262144"
GPU_TESTS = ("test_gpu_kernels.py", "test_contract_gpu.py", "test_gpu_linear.py")
WHERE = """
import platform, sys, torch, triton, numpy
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__,
      "numpy", numpy.__version__)
torch.cuda.is_available() or sys.exit(3)
print("card", torch.cuda.get_device_name(), torch.cuda.get_device_properties(0))
import drkl_triton.kernels
print("package", drkl_triton.__file__)
"""


class Step(NamedTuple):
    stage: str
    name: str  # of its log, and of its CSV if it makes one
    seconds: int
    command: str  # a script of bench/ first, or a program
    dry: str = ""  # other arguments on the pretend card; "-": it does not run there
    beside: bool = False  # at the same time as its neighbours of this stage


RUN = (
    "run.py --device cuda --mode forward backward --dtype bfloat16 --no-plots --repeats 9 --out . "
)
TUNE = "tune.py --dtype bfloat16 --out {name}.csv "
# From another folder: the root has a drkl_triton/ without kernels/
TEST = (
    "-m pytest -c {root}/pyproject.toml -p no:cacheprovider -m gpu -rfE --color=no "
    "-v -o faulthandler_timeout=60 "
)
DRY_RUN = "--vocab 301 --tokens 8 --repeats 1 --copy-mb 4 "
DRY_TUNE = "--device cuda --vocab 600 --tokens 5 --repeats 1 --jobs 0 --copy-mb 4 "
LIMIT = "--name {name} --seconds {seconds} "
COMPILED = RUN + "--op drkl reverse_kl --providers compile --vocab 128256 32000 "

FIRST = (
    Step("versions", "versions", 20, "-c WHERE", dry="-"),
    Step(
        "headline", "headline", 40,
        RUN + LIMIT + f"--op drkl --providers kernels triton dense --vocab {VOCABULARIES}", DRY_RUN,
    ),
    Step(
        "reverse_kl", "reverse_kl", 30,
        RUN + LIMIT + f"--op reverse_kl --providers kernels triton liger --vocab {VOCABULARIES}",
        DRY_RUN,
    ),
    Step("tests", "tests", 100, TEST + "-n 6 --dist worksteal {tests}", "-n 0", beside=True),
    Step("tests", "compile_ahead", 100, COMPILED + "--name compile_ahead --repeats 1", "-", True),
    Step("compile", "compile", 40, COMPILED + LIMIT, DRY_RUN + "--providers dense"),
    Step(
        "others", "float32", 15,
        RUN + LIMIT + "--op drkl --dtype float32 --providers kernels triton dense "
        "--vocab 128256 32000", DRY_RUN,
    ),
    Step(
        "others", "softmax", 15,
        RUN + LIMIT + "--op softmax --providers triton dense --vocab 128256 32000 50257", DRY_RUN,
    ),
    Step(
        "others", "losses", 15,
        RUN + LIMIT + "--op forward_kl js_divergence mixed_kl skew_kl alpha_beta adaptive_kl "
        "--providers kernels triton dense --vocab 128256", DRY_RUN,
    ),
    Step("experiments", "speed", 15, TEST + "{root}/tests/test_gpu_speed.py", "-n 0"),
    Step(
        "experiments", "splits", 40,
        TUNE + "--seconds {seconds} --lanes 128 --splits 1 2 4 8 16 32 --vocab 128256 32000 "
        "--tokens 8192 64 528 1400 4096 132", DRY_TUNE,
    ),
    Step(
        "experiments", "lanes", 20,
        TUNE + "--seconds {seconds} --lanes 128 64 256 --vocab 128256 32000 --tokens 8192",
        DRY_TUNE,
    ),
    Step(
        "linear", "linear", 40,
        "linear.py --device cuda --no-plots --out . " + LIMIT + "--op drkl --repeats 5 "
        "--tokens 8192 --vocab 128256 32000 --providers products triton recompute dense",
        "--vocab 300 --tokens 70 --hidden 16 --repeats 1",
    ),
    Step(
        "linear", "linear_rivals", 45,
        "linear.py --device cuda --no-plots --out . " + LIMIT + "--op reverse_kl --repeats 5 "
        "--tokens 8192 --vocab 128256 --providers products triton compile liger", "-",
    ),
    Step(
        "tools", "ncu", 40,
        "ncu --clock-control none -k regex:row_(sums|grad)_kernel -c 2 --section SpeedOfLight "
        "--section Occupancy --section MemoryWorkloadAnalysis --section WarpStateStats {python} "
        + "{bench}/" + RUN + "--name ncu --repeats 1 --op drkl --providers kernels --vocab 128256",
        "-", True,
    ),
    Step(
        "tools", "sanitizer", 40,
        "compute-sanitizer --error-exitcode 9 {python} {bench}/" + RUN + "--name sanitizer "
        "--copy-mb 16 --op drkl --providers kernels triton --vocab 5003 4096 --tokens 33 "
        "--repeats 1", "-", True,
    ),
)  # fmt: skip
# What a second machine is for: whether the mended is right and how fast it is.
SECOND = {"versions": 20, "headline": 45, "tests": 95, "splits": 30, "sanitizer": 40}


def tail(path, characters=1500):
    return path.read_text(errors="replace")[-characters:] if path.exists() else ""


def rows_of(path):
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Day:
    def __init__(self, folder, dry):
        self.folder, self.dry, self.work = folder, dry, Path(tempfile.mkdtemp(prefix="gpu_day."))
        self.lines, self.due, self.running, self.failed = [], 0.0, [], False
        self.statuses = {}
        self.site()
        self.env = os.environ | {
            "COMMIT": self.commit(),
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(self.work / "site"), os.environ.get("PYTHONPATH")])
            ),
            "TRITON_INTERPRET": "0",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.head = [
            f"commit {self.env['COMMIT']}, sources {sources()}, "
            + time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())
        ]
        if dry:
            self.head.insert(0, "DRY RUN on a pretend CUDA: no time in this folder is a GPU's.")

    def site(self):
        """The package as setup.py maps it, and what was packed: no pip, no build."""
        site = self.work / "site"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "drkl_triton", site / "drkl_triton", ignore=ignored)
        shutil.copytree(ROOT / "kernels", site / "drkl_triton" / "kernels", ignore=ignored)
        for wheel in PACKED.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(site)

    @staticmethod
    def commit():
        """As given, or as packed with these very sources (a copy of the tree may come with an older
        .git), or git's.
        """
        packed = PACKED / "COMMIT"
        name, _, packed_sources = packed.read_text().partition(" ") if packed.exists() else [""] * 3
        if packed_sources.strip() != sources():
            name = ""
        return os.environ.get("COMMIT") or name or git_commit() or "unknown"

    # --- running ---

    def start(self, step, seconds):
        words = step.command.replace("{tests}", " ".join(self.tests()))
        names = {"name": step.name, "seconds": max(1, round(seconds) - 5), "root": ROOT,
                 "bench": BENCH, "python": sys.executable}  # fmt: skip
        argv = [word.format(**names) for word in words.split()] + (
            step.dry.split() if self.dry else []
        )
        argv = [WHERE if word == "WHERE" else word for word in argv]
        if argv[0].endswith(".py"):
            argv[0] = str(BENCH / argv[0])
            pretend = [str(ROOT / "tests" / "pretend_cuda.py")] if self.dry else []
            argv = [sys.executable, *pretend, *argv]
        elif argv[0].startswith("-"):
            argv.insert(0, sys.executable)
        with (self.work / f"{step.name}.txt").open("w") as log:
            process = subprocess.Popen(
                argv, cwd=self.work, env=self.env, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        return process

    @staticmethod
    def tests():
        return [str(p) for name in GPU_TESTS if (p := ROOT / "tests" / name).exists()]

    def stop(self, process, number):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass

    def together(self, steps):
        """Runs them at the same time, until the longest of their limits."""
        self.due += max(step.seconds for step in steps)
        end, began = max(self.due - GRACE, self.now() + 1), self.now()
        started = {}
        for step in steps:
            try:
                started[step] = self.start(step, end - began)
            except FileNotFoundError as error:
                self.note(step, "not there", 0, str(error))
        self.running, flushed = list(started.values()), self.now()
        while started:
            for step, process in list(started.items()):
                status = process.poll()
                if status is None and self.now() > end:
                    self.stop(process, signal.SIGINT)
                    try:
                        process.wait(GRACE)
                    except subprocess.TimeoutExpired:
                        pass
                    status = "cut off"
                if status is not None:
                    self.stop(process, signal.SIGKILL)  # and its children
                    process.wait()
                    self.statuses[step.name] = status
                    said = status if status == "cut off" else f"FAILED {status}" if status else "ok"
                    result = self.result(step)
                    if "pytest" in step.command and " passed" not in result and not self.dry:
                        said = "FAILED" if said == "ok" else said
                    self.note(step, said, self.now() - began, result)
                    del started[step]
            if self.now() - flushed > 10:
                self.flush()
                flushed = self.now()
            time.sleep(0.1)
        self.running = []
        self.flush()

    def now(self):
        return time.monotonic() - START

    def note(self, step, said, took, text):
        self.failed |= said != "ok" and not (self.dry and said == "not there")
        self.lines.append(f"{step.name:16} {said:10} {took:4.0f} s   {text}")
        print(f"[{self.now():4.0f} s] {self.lines[-1]}", flush=True)

    def result(self, step):
        """What a step came to, in as many lines as it deserves."""
        log = self.work / f"{step.name}.txt"
        if "pytest" in step.command:
            text = log.read_text(errors="replace")
            lines = re.findall(
                r"^(?:FAILED|ERROR) .*|^.*\d (?:passed|failed|skipped).*$", text, re.M
            ) or re.findall(r"(?:FAILED|ERROR) .*", text)  # cut off: as the workers said it
            return "\n    ".join(line[:160] for line in lines[-30:]) or tail(log)
        rows = rows_of(self.work / f"{step.name}.csv")
        if not rows:
            return tail(log).strip()
        lines = [f"{len(rows)} rows"]
        if step.name in ("splits", "lanes"):
            text = log.read_text(errors="replace")
            lines += re.findall(r"^(?:[A-Z_]+ = |Proposed|geometric).*", text, re.M)
        else:
            lines += [line_of(row) for row in rows if row.get("ms")]
        lines += sorted(
            {f"{r['provider']}: {r['note']}" for r in rows if r.get("note") and r.get("provider")}
        )
        return "\n    ".join(lines)

    # --- what comes of it ---

    def flush(self):
        """summary.txt and results.tar.gz, each by way of a second file."""
        where = tail(self.work / "versions.txt")
        summary = "\n".join([*self.head, where, *self.lines, "", *self.table(), ""])
        partial = self.folder / "summary.part"
        partial.write_text(summary)
        os.replace(partial, self.folder / "summary.txt")
        partial = self.folder / "results.part"
        with tarfile.open(partial, "w:gz") as tar:
            for path in sorted(self.work.glob("*.*")):
                if path.suffix in (".csv", ".txt"):
                    tar.add(path, path.name)
        os.replace(partial, self.folder / "results.tar.gz")

    def table(self):
        """Predicted, measured, ratio."""
        lines = [f"{'':34}{'predicted':>12}{'measured':>12}{'ratio':>8}"]
        for p in rows_of(BENCH / "predictions.csv"):
            rows = rows_of(self.work / f"{p['csv']}.csv")
            card = (rows[0].get("device") or tail(self.work / "versions.txt")) if rows else ""
            column = "h200" if "H200" in card else "h100" if "H100" in card else ""
            measured = measure(p, rows)
            expected = float(p[column]) if column else None
            if measured and expected:
                cells = f"{expected:12.2f}{measured:12.2f}{measured / expected:8.2f}"
            else:
                cells = f"{expected or '–':>12}{'–':>12}{'':8}"
            label = f"{p['csv']} {p['provider']} {p['mode']} {int(p['vocab']):,} {p['unit']}"
            lines.append(f"{label:34}{cells}".rstrip())
        return lines

    def end(self):
        for process in self.running:
            self.stop(process, signal.SIGKILL)
        self.flush()
        shutil.rmtree(self.work, ignore_errors=True)


def line_of(row):
    percent = float(row.get("percent_of_copy") or 0)
    beside = f"{percent:4.0f} % of copy" if percent else f"x{row.get('x_products', '')} of products"
    where = f"{row['op']:10} {row.get('mode', ''):8} V={row['vocab']:>6} {row['provider']:12}"
    return f"{where} {float(row['ms']):8.3f} ms {beside} {row.get('check', row.get('right', ''))}"


def measure(p, rows):
    """The number that a prediction is about, or None."""
    rows = [row for row in rows if row.get("vocab") == p["vocab"] and row.get("ms")]
    if p["provider"] == "copy":
        found = [float(row["copy_gb_per_s"]) for row in rows]
        return max(found, default=None)
    wanted = (p["provider"], p["mode"])
    found = [float(r["ms"]) for r in rows if (r["provider"], r.get("mode")) == wanted]
    return min(found, default=None)


def sources():
    """Says whether two trees are the same."""
    digest = hashlib.sha256()
    for path in sorted(
        p for f in ("drkl_triton", "kernels", "bench", "tests") for p in (ROOT / f).glob("*.py")
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def git_commit():
    git = ["git", "-C", str(ROOT)]
    try:
        name, dirt = (
            subprocess.run(
                [*git, *words], check=True, capture_output=True, text=True
            ).stdout.strip()
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name + ("-dirty" if dirt else "")


def pack():
    PACKED.mkdir(exist_ok=True)
    (PACKED / "COMMIT").write_text(f"{git_commit()} {sources()}\n")
    wheel = ["pip", "download", "--quiet", "--no-deps", "-d", str(PACKED), "liger-kernel"]
    return subprocess.run([sys.executable, "-m", *wheel]).returncode


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="FOLDER")
    add("--second", action="store_true")
    add("--dry", action="store_true")
    add("--pack", action="store_true")
    add("--only", nargs="+", default=[], metavar="STEP", choices=[s.name for s in FIRST])
    options = parser.parse_args()
    if options.pack:
        return pack()
    if options.folder is None:
        parser.error("say where the results go")
    options.folder.mkdir(parents=True, exist_ok=True)
    steps = FIRST
    if options.second:
        steps = [s._replace(seconds=SECOND[s.name]) for s in steps if s.name in SECOND]
    if options.only:
        steps = [step for step in steps if step.name in options.only]
    day = Day(options.folder.resolve(), options.dry)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while steps:
            count = 1
            while steps[0].beside and count < len(steps) and steps[count].stage == steps[0].stage:
                count += 1
            first = [step for step in steps[:count] if not (day.dry and step.dry == "-")]
            if first:
                day.together(first)
            steps = steps[count:]
            if day.statuses.get("versions") == 3:
                print("PyTorch sees no GPU here; --dry does without", file=sys.stderr)
                return 2
        print("\n".join(["", *day.table()]), flush=True)
        print(f"\n{day.now():.0f} s; {day.folder}/summary.txt, results.tar.gz", flush=True)
        return int(day.failed)
    finally:
        day.end()


if __name__ == "__main__":
    sys.exit(main())
