"""Packaging: kernels/ is installed as drkl_triton.kernels, never as a top-level `kernels`.

The top-level name `kernels` belongs to Hugging Face's package, which TRL and transformers import.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "drkl_triton" / "_version.py").read_text(), re.MULTILINE
).group(1)

setup(
    name="drkl-triton",
    version=VERSION,
    description="Softmax, reverse KL and DRKL for LLM distillation, as Triton kernels that never "
    "hold a probability tensor",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The drkl-triton developers",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["distillation", "KL divergence", "reverse KL", "softmax", "Triton", "LLM"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    package_dir={"drkl_triton": "drkl_triton", "drkl_triton.kernels": "kernels"},
    packages=[
        *find_packages(str(ROOT), include=["drkl_triton", "drkl_triton.*"]),
        "drkl_triton.kernels",
    ],
    package_data={"drkl_triton": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.8",
        "numpy",
        'triton>=3.4; platform_system == "Linux"',
    ],
    # Exact versions stand in constraints.txt.
    extras_require={
        "trl": ["trl>=1.16"],  # for drkl_triton.adapters.trl; it needs Python 3.11
        "test": [
            "pytest>=8",
            "pytest-xdist",
            "hypothesis",
            "build",
            "setuptools>=77",
            "safetensors",
            'trl>=1.16; python_version >= "3.11"',
            'kernels>=0.17; python_version >= "3.11"',
        ],
        "cache": ["safetensors", "tqdm"],  # for drkl_triton.teacher_cache
        "bench": ["matplotlib", "tqdm"],
        "examples": [
            "tokenizers",
            "matplotlib",
            "tqdm",
            "transformers>=5.24",
            "gguf",
            "safetensors",
        ],
        "dev": ["ruff", "pre-commit", "build"],
    },
)
