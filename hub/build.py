"""Writes the package in the layout of Hugging Face's kernel Hub, as a pure-Python kernel.

python hub/build.py                 # into dist/hub-kernel
python hub/build.py --out FOLDER    # new, empty, or an earlier result, which is replaced

Every variant (build/torch-cuda and so on) is the whole package but its adapters: it runs the Triton
kernels on a GPU and tiled PyTorch elsewhere. `kernels` imports it under the id in metadata.json, so
its imports must all be relative; the check at the end of the build sees to that.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "drkl-triton"
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
# kernels 0.17 has a list of the packages that a kernel may ask for. Neither torch nor Triton, which
# torch's builds for GPUs bring, is on it.
PYTHON_DEPENDS: list[str] = []
KERNELS_MINVER = "0.17.0"


def sources() -> dict[str, bytes]:
    """Path inside a variant -> content: drkl_triton/ at the top, kernels/ below it."""
    package, kernels = ROOT / "drkl_triton", ROOT / "kernels"
    files = {path.name: path for path in sorted(package.glob("*.py"))}
    files |= {f"kernels/{path.name}": path for path in sorted(kernels.glob("*.py"))}
    files["py.typed"] = package / "py.typed"
    return {name: path.read_bytes() for name, path in files.items()}


def hub_version(version: str) -> int:
    """The Hub numbers versions with one integer that grows when the interface breaks: the major
    number, or 0 until there is one.
    """
    return int(version.split(".")[0])


def metadata(backend: str, files: dict[str, bytes], version: str) -> dict:
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(name.encode() + b"\0" + content + b"\0")
    return {
        # a module name, unlike that of any other build
        "id": f"_{NAME.replace('-', '_')}_{backend}_{digest.hexdigest()[:10]}",
        "name": NAME,
        "version": hub_version(version),
        "kernels-minver": KERNELS_MINVER,
        "license": "Apache-2.0",
        "python-depends": PYTHON_DEPENDS,
        "backend": {"type": backend},
    }


def absolute_imports(name: str, content: bytes) -> list[str]:
    """Imports of the package by its name, which does not exist where a kernel is loaded."""
    found = []
    for node in ast.walk(ast.parse(content, name)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            if module.split(".")[0] in ("drkl_triton", "kernels"):
                found.append(f"{name}:{node.lineno}: {module}")
    return found


def replaceable(out: Path) -> bool:
    """Whether all that ``out`` holds was written by this script."""
    if not out.exists() and not out.is_symlink():
        return True
    if not out.is_dir():
        return False
    if not all(path.name in ("build", "README.md", "LICENSE") for path in out.iterdir()):
        return False
    if not (out / "build").exists():
        return not any(out.iterdir())
    if (out / "build").is_symlink() or not (out / "build").is_dir():
        return False
    return all(is_variant(path) for path in (out / "build").iterdir())


def is_variant(path: Path) -> bool:
    try:
        about = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return path.name.startswith("torch-") and not path.is_symlink() and about.get("name") == NAME


def build(out: Path) -> None:
    files = sources()
    wrong = [
        line
        for name, content in files.items()
        if name.endswith(".py")
        for line in absolute_imports(name, content)
    ]
    if wrong:
        raise SystemExit("A Hub kernel may import itself relatively only:\n" + "\n".join(wrong))
    if not replaceable(out):
        raise SystemExit(
            f"{out} must be new, an empty folder, or hold nothing but an earlier result; it is "
            "left as it was. Pass another --out"
        )
    if (out / "build").exists():
        shutil.rmtree(out / "build")

    version = ast.literal_eval(files["_version.py"].decode().split("=")[1].strip())
    for backend in BACKENDS:
        variant = out / "build" / f"torch-{backend}"
        for name, content in files.items():
            path = variant / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        about = json.dumps(metadata(backend, files, version), indent=2)
        (variant / "metadata.json").write_text(about + "\n", encoding="utf-8")
    shutil.copy(ROOT / "hub" / "CARD.md", out / "README.md")
    shutil.copy(ROOT / "LICENSE", out / "LICENSE")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "hub-kernel", metavar="FOLDER")
    out = parser.parse_args(argv).out
    build(out)
    for backend in BACKENDS:
        print(out / "build" / f"torch-{backend}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
