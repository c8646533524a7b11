"""No file is ever unpickled, run or parsed by a reader that builds objects; HDF5 and safetensors
hold numbers alone.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path for part in ("stacking", "data_prep", "launch") for path in (ROOT / part).rglob("*.py")
)  # fmt: skip
UNPICKLERS = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml",
    "pandas",
}  # fmt: skip
DEEPSPEED_CALLS = {"load_checkpoint", "save_checkpoint", "load_universal_checkpoint"}
"""DeepSpeed's own files are pickles; this trainer neither writes nor reads them."""
OURS = {"stacking/hf.py": ["trust_remote_code"]}
"""An export is checked by running the class that was copied into it a moment before; test_hf_remote
holds that reading a folder back runs nothing.
"""


def faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (name for name in names if name.split(".")[0] in UNPICKLERS)
        if isinstance(node, ast.Call):
            yield from _call_faults(node)


def _call_faults(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
    if name in ("eval", "exec", "compile") or name.split(".")[-1] in DEEPSPEED_CALLS:
        yield name
    if name == "torch.load" and keywords.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
        yield "np.load without allow_pickle=False"
    if name in ("torch.jit.load", "torch.package.PackageImporter"):
        yield name
    if keywords.get("trust_remote_code", "False") != "False":
        yield "trust_remote_code"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_unpickled(path: Path) -> None:
    found = list(faults(ast.parse(path.read_text())))
    assert found == OURS.get(str(path.relative_to(ROOT)), [])


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from joblib import load", "torch.load(p)", "np.load(p)", "eval(text)",
        "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "import yaml",
        "engine.load_checkpoint(p)", "Auto.from_pretrained(p, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(line: str) -> None:
    assert list(faults(ast.parse(line)))
