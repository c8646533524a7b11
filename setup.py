"""Package metadata: what `pip install -e .` needs. The tested versions are in constraints.txt."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent


def version() -> str:
    """The version, kept in one place: stacking/__init__.py."""
    found = re.search(r'^__version__ = "(.+)"$', (HERE / "stacking/__init__.py").read_text(), re.M)
    assert found, "stacking/__init__.py has no __version__ line"
    return found.group(1)


setup(
    name="progressive-bert-trainer",
    version=version(),
    description="Pre-trains BERT progressively on DeepSpeed: small first, then grown in one job.",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "data_prep",
        "data_prep.cleaning",
        "data_prep.foreign",
        "data_prep.report",
        "data_prep.sources",
        "data_prep.tokens",
        "stacking",
        "stacking.growth",
    ],
    package_data={"stacking": ["remote_code/*.py"]},  # copied into exports, imported by nobody here
    # Lower bounds are what the tests run with (constraints.txt), or, where that has no build for
    # Python 3.10, what pip takes there. Older releases may work; nobody has tried.
    install_requires=[
        "datasketch>=2.0",  # near-duplicate documents
        "deepspeed>=0.19.8,<0.20",  # 0.19 removed configuration keys; engine.py uses private names
        "h5py>=3.16",
        "isal>=1.9",  # gzip at seven times zlib's speed, for NVIDIA's dialect
        "matplotlib>=3.10.9",
        "mwparserfromhell>=0.7.2",  # Wikipedia's dumps
        "numpy>=2.2.6",
        "psutil>=7.2",
        "pyarrow>=25.0",  # words as dictionaries; Parquet
        "pydantic>=2.14",
        "rich>=15.0",
        "safetensors>=0.8",
        "tensorboard>=2.21",  # DeepSpeed's monitor section
        "tokenizers>=0.23",
        "torch>=2.13",
        "transformers>=5.20.2",
        "typing_extensions>=4.16",  # Self, for Python 3.10
        "xxhash>=4.1",  # duplicate paragraphs and documents
        "zstandard>=0.25",  # text in .zst
    ],
    extras_require={
        # DeepSpeed's FusedAdam is compiled on first use: it needs ninja and the CUDA toolkit's
        # nvcc. apex can be no extra: PyPI's `apex` is an unrelated package; NVIDIA's is built from
        # its source repository. Where it is installed the DeepSpeed JSON may choose its kernels.
        "gpu": ["ninja>=1.11"],
        "glue": ["scikit-learn>=1.7.2", "scipy>=1.15.3"],  # its metrics
        "mpi": ["mpi4py>=4.0"],  # training and shards on MPI ranks; needs an MPI library
        "dev": [
            "hypothesis>=6.168",
            "mpi4py>=4.0",
            "mypy>=2.4",
            "pytest>=9.2",
            "pytest-timeout>=2.4",
            "ruff>=0.17",
            "scikit-learn>=1.7.2",
            "scipy>=1.15.3",
        ],
    },
)
