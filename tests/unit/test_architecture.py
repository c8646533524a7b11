"""Who may import whom, and how long a file may be: the house rules, read off the source."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import data_prep
import stacking

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = sorted((ROOT / "launch").glob("*.py"))
PACKAGES = sorted([*(ROOT / "stacking").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")])
# Shipped with exports, and run where this project is not: no package of ours, but data.
SHIPPED = sorted((ROOT / "stacking/remote_code").glob("*.py"))
PACKAGES = [path for path in PACKAGES if path not in SHIPPED]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SOURCES = [*PACKAGES, *SHIPPED, *LAUNCH, *TESTS]
SHELL = [*sorted((ROOT / "launch").rglob("*.sh")), ROOT / "tests/run.sh",
         ROOT / "benchmarks/evidence_gpu.sh"]  # fmt: skip
MOST_LINES, MOST_FUNCTION_LINES, MOST_LAUNCH_LINES = 600, 60, 100
# A mark without an issue number, `(#12)`; spelt so that it does not find itself.
UNNUMBERED = r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b(?!\(#\d+\))"

# A module of stacking may import modules of its own layer and of those below; never in a circle.
LAYERS = {
    0: {"errors", "commands"},
    1: {"config_base", "config_branches", "config_faults", "config_learning_rate",
        "config_model", "config_stage", "branches", "config", "config_loading", "schedule",
         "distributed", "launchers", "deepspeed_schema", "deepspeed_checks", "deepspeed_config",
         "deepspeed_optimizer", "stopping", "timetable", "progress", "node_copies",
         "rank_agreement", "rank_ledger", "rank_watch"},
    2: {"snapshot", "parameter_groups", "functional", "positions", "layers", "attention",
        "pooling", "unpadding", "encoder", "masked_lm_loss", "backbone", "modeling", "residuals",
        "growth", "freezing", "fine_tuning_models", "fine_tuning_batch",
        "sample_order", "shard_reader", "truncation", "batch", "dataset", "cost",
        "cluster_time", "metrics"},
    3: {"engine", "engine_log", "engine_module", "engine_options", "engine_teardown",
        "client_optimizers", "gradient_norms", "optimizer_state", "state_parts", "loss_scaling",
        "checkpoint", "checkpoint_writer", "resume", "run_folder", "autopsy"},
    4: {"stage_growth", "stage_switch"},
    5: {"run_branch", "run_data", "run_log", "run_origin", "run_saving", "run_staging", "run_start",
        "trainer",
        "study", "hf",
        "hf_homes", "hf_tokenizer", "hf_folder", "hf_grow", "hf_probe", "hf_side_files",
        "hf_remote", "hf_card", "hf_card_facts", "hf_start", "hf_vocabulary",
        "glue", "glue_tasks", "glue_data", "glue_features", "glue_metrics", "glue_predictions",
        "glue_scores", "glue_training", "glue_runs", "glue_tables", "glue_outcome",
        "score_statistics", "tokenizing",
        "pretrained", "fine_tuning", "fine_tuning_flags", "fine_tuning_jobs", "side_by_side",
        "squad_training", "squad_runs", "squad", "squad_data", "squad_features",
        "squad_metrics", "squad_predictions", "squad_scoring",
        "attention_maps", "attention_maps_figures", "attention_maps_files",
        "attention_maps_models", "attention_maps_text",
        "report", "report_html", "report_metrics", "report_figures",
        "report_growth_figures", "report_spikes", "comparison",
        "comparison_frontier", "comparison_runs", "comparison_page", "comparison_figures",
        "comparison_costs", "comparison_groups", "comparison_names", "comparison_trunks",
        "doctor", "doctor_agreement", "doctor_devices", "doctor_findings", "doctor_hostfile",
        "doctor_hosts", "doctor_network", "doctor_probe", "doctor_recipe", "doctor_storage",
        "doctor_table", "doctor_variables",
        "comparison_budget", "comparison_controls", "comparison_seeds", "comparison_switch",
        "comparison_timing",
        "stage_plan", "stage_plan_table", "stage_plan_cluster", "stage_plan_curves",
        "stage_plan_pilots", "stage_plan_suggest", "stage_plan_advice", "stage_plan_request",
        "stage_plan_timing"},
}  # fmt: skip
LAYER = {name: layer for layer, names in LAYERS.items() for name in names}
ONLY_IN = {
    "deepspeed": {"engine", "engine_module", "engine_teardown", "client_optimizers"},
    "apex": {"engine_module", "client_optimizers"},
    "transformers": {"hf", "hf_homes", "hf_tokenizer", "hf_folder", "hf_probe", "hf_card"},
    "matplotlib": {"attention_maps_figures", "report_figures", "report_growth_figures"},
    "argparse": set[str](),
}


def module(path: Path) -> str:
    """`stacking/growth/depth.py` is `growth`: a package is one room."""
    inside = path.relative_to(ROOT).parts[1:]
    return inside[0].removesuffix(".py")


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes outside `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from nodes(child)


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names: `from a import b` gives `a.b`."""
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(path: Path) -> set[str]:
    """Modules of stacking that a file of stacking imports, itself left out."""
    found = {
        name.split(".")[1] for name in imports(parse(path)) if name.startswith("stacking.")
    } & set(LAYER)
    return found - {module(path)}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGES, ids=name_of)
def test_libraries_are_imported_only_in_their_room(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(parse(path))}
    for library, rooms in ONLY_IN.items():
        is_home = path.is_relative_to(ROOT / "stacking") and module(path) in rooms
        assert library not in roots or is_home, f"{library} belongs in {sorted(rooms) or 'launch'}"


@pytest.mark.parametrize("path", [p for p in PACKAGES if "data_prep" in p.parts], ids=name_of)
def test_data_prep_knows_nothing_of_training(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(parse(path))}
    assert not roots & {"torch", "deepspeed", "stacking", "pydantic", "transformers"}


@pytest.mark.parametrize("path", [p for p in PACKAGES if "stacking" in p.parts], ids=name_of)
def test_stacking_imports_only_its_own_layer_and_those_below(path: Path) -> None:
    for name in imports(parse(path)):
        if name.startswith("data_prep"):
            assert name.split(".")[1] in {"shard_format", "plain_files", "masking", "errors"}, name
    if module(path) == "__init__":
        return
    assert module(path) in LAYER, "give the new module a layer here and in architecture.md"
    for other in imported_rooms(path):
        assert LAYER[other] <= LAYER[module(path)], f"{other} lies above {module(path)}"


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_shipped_code_needs_torch_and_transformers_only(path: Path) -> None:
    beside = {shipped.stem for shipped in SHIPPED}
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.module in beside
        elif isinstance(node, ast.Import | ast.ImportFrom):
            roots = [getattr(node, "module", None) or alias.name for alias in node.names]
            assert {r.split(".")[0] for r in roots} <= {
                "torch",
                "transformers",
                *sys.stdlib_module_names,
            }


def test_there_is_no_import_cycle() -> None:
    edges: dict[str, set[str]] = {}
    for path in (path for path in PACKAGES if path.is_relative_to(ROOT / "stacking")):
        if path.name != "__init__.py" or path.parent.name != "stacking":
            edges.setdefault(module(path), set()).update(imported_rooms(path))
    while leaves := {name for name, below in edges.items() if not below & set(edges)}:
        edges = {name: below for name, below in edges.items() if name not in leaves}
    assert not edges, f"these import each other in a circle: {sorted(edges)}"


def test_the_rooms_of_data_prep_form_no_circle() -> None:
    edges: dict[str, set[str]] = {}
    for path in (ROOT / "data_prep").rglob("*.py"):
        below = {n.split(".")[1] for n in imports(parse(path)) if n.startswith("data_prep.")}
        edges.setdefault(module(path), set()).update(below - {module(path)})
    while leaves := {name for name, below in edges.items() if not below & set(edges)}:
        edges = {name: below for name, below in edges.items() if name not in leaves}
    assert not edges, f"these import each other in a circle: {sorted(edges)}"


@pytest.mark.parametrize("path", [*PACKAGES, *LAUNCH], ids=name_of)
def test_no_function_imports(path: Path) -> None:
    for node in nodes(parse(path)):
        if isinstance(node, ast.FunctionDef):
            inside = [n.lineno for n in nodes(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not inside, f"{node.name} imports on line {inside}"


@pytest.mark.parametrize("path", PACKAGES, ids=name_of)
def test_the_environment_is_read_only_in_distributed(path: Path) -> None:
    # The probe is sent to other hosts as a text, and can import nothing of ours there.
    if name_of(path) in {"stacking/distributed.py", "stacking/doctor_probe.py"}:
        return
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            assert node.attr not in {"environ", "getenv", "putenv"}, f"line {node.lineno}"


@pytest.mark.parametrize("path", LAUNCH, ids=name_of)
def test_launch_scripts_are_thin(path: Path) -> None:
    assert len(path.read_text().splitlines()) < MOST_LAUNCH_LINES


def test_launch_is_no_package() -> None:
    assert not list((ROOT / "launch").rglob("__init__.py"))
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MOST_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", [*SOURCES, *SHELL, ROOT / "setup.py"], ids=name_of)
def test_source_is_ascii_and_each_to_do_names_its_issue(path: Path) -> None:
    text = path.read_bytes().decode("ascii")
    assert not re.findall(UNNUMBERED, text)


@pytest.mark.parametrize("package", [stacking, data_prep], ids=["stacking", "data_prep"])
def test_the_packages_are_this_checkouts(package: object) -> None:
    assert Path(str(getattr(package, "__file__"))).is_relative_to(ROOT)  # noqa: B009


def test_nothing_is_imported_from_typing_that_python_3_10_lacks() -> None:
    """These come from typing_extensions; setup.py promises Python 3.10."""
    newer = {"Self", "Never", "LiteralString", "assert_never", "assert_type", "reveal_type",
             "Required", "NotRequired", "Unpack", "TypeVarTuple", "override"}  # fmt: skip
    files = [path for part in ("stacking", "data_prep", "launch", "benchmarks", "tests")
             for path in (ROOT / part).rglob("*.py")]  # fmt: skip
    assert len(files) > 300
    for path in (path for path in files if path not in SHIPPED):
        found = {
            name for name in imports(ast.parse(path.read_text())) if name.startswith("typing.")
        }
        assert not {name.removeprefix("typing.") for name in found} & newer, path
