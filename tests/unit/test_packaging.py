"""setup.py, constraints.txt and the shell scripts agree with the source and keep their promises."""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from stacking.hf_remote import CODE, CODE_FILES

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    ".ci/run", "tests/run.sh",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("launch/**/*.sh")),
]  # fmt: skip

# Stands for python: notes its arguments, is slow enough to overlap, and fails where told to.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
    *-c*m.version*) exit 1 ;;  # torch is not here
    *pip*) sleep 0.2; echo "pip says: line $RANDOM"; [ ! -e "$CALLS.fail" ] ;;
esac
"""


@pytest.fixture(scope="module")
def setup_arguments() -> dict[str, ast.expr]:
    call = ast.parse((ROOT / "setup.py").read_text()).body[-1]
    assert isinstance(call, ast.Expr)
    assert isinstance(call.value, ast.Call)
    return {str(keyword.arg): keyword.value for keyword in call.value.keywords}


@pytest.fixture(scope="module")
def requirements(setup_arguments: dict[str, ast.expr]) -> list[Requirement]:
    extras = ast.literal_eval(setup_arguments["extras_require"])
    required = ast.literal_eval(setup_arguments["install_requires"])
    return [Requirement(line) for line in sum(extras.values(), required)]


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonical(pin.name): pin for pin in found}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_setup_names_each_package(setup_arguments: dict[str, ast.expr]) -> None:
    folders = [path.parent for top in ("stacking", "data_prep")
               for path in (ROOT / top).rglob("__init__.py")]  # fmt: skip
    dotted = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(ast.literal_eval(setup_arguments["packages"])) == dotted


def test_setup_ships_the_code_of_exports(setup_arguments: dict[str, ast.expr]) -> None:
    """It is data of `stacking`, as it is no package: a wheel would lack it."""
    data = ast.literal_eval(setup_arguments["package_data"])
    shipped = {path for pattern in data["stacking"] for path in (ROOT / "stacking").glob(pattern)}
    assert {path.name for path in shipped} >= set(CODE_FILES)
    assert all((CODE / name) in shipped for name in CODE_FILES)


def test_setup_requires_each_package_that_the_source_imports(
    requirements: list[Requirement],
) -> None:
    imported = set()
    for path in [*ROOT.glob("stacking/**/*.py"), *ROOT.glob("data_prep/*.py")]:
        if path.parent.name == "remote_code":  # imports its neighbour; test_architecture.py looks
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
    ours = {"stacking", "data_prep"}
    # apex is optional and can be no dependency; pydantic brings its core.
    foreign = imported - set(sys.stdlib_module_names) - ours - {"apex", "pydantic_core"}
    assert foreign <= {requirement.name for requirement in requirements}


def test_apex_is_no_dependency(requirements: list[Requirement]) -> None:
    assert "apex" not in {requirement.name for requirement in requirements} | set(pins())


def test_each_requirement_is_pinned_within_its_bounds(requirements: list[Requirement]) -> None:
    for requirement in requirements:
        if requirement.name == "mpi4py":  # needs an MPI library, so it is not installed by default
            continue
        pin = pins()[canonical(requirement.name)]
        version = next(iter(pin.specifier)).version
        assert version in requirement.specifier, f"{requirement} excludes the pin {pin}"


def test_the_changelog_has_the_version() -> None:
    found = re.search(r'__version__ = "(.+)"', (ROOT / "stacking/__init__.py").read_text())
    assert found
    assert f"\n## {found.group(1)}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_shell_script_parses(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_ci_calls_the_test_command() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "tests/run.sh" in (ROOT / ".ci/run").read_text()


def test_the_demo_refuses_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    done = subprocess.run(
        ["bash", str(ROOT / "launch/demo.sh"), str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture
def fake(tmp_path: Path) -> "Setup":
    return Setup(tmp_path)


class Setup:
    """setup_env.sh in a checkout of its own, with an active environment whose python is fake."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "checkout"
        (self.checkout / "launch").mkdir(parents=True)
        for name in ("launch/setup_env.sh", "constraints.txt", "setup.py"):
            (self.checkout / name).write_bytes((ROOT / name).read_bytes())
        self.calls = folder / "calls"
        self.environment = folder / "env"
        (self.environment / "bin").mkdir(parents=True)
        python = self.environment / "bin/python"
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)

    def start(self, **changes: str) -> "subprocess.Popen[str]":
        variables = {
            **os.environ, "VIRTUAL_ENV": str(self.environment), "CALLS": str(self.calls), **changes
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(self.checkout / "launch/setup_env.sh")], env=variables, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, **changes: str) -> tuple[int, str]:
        process = self.start(**changes)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def installs(self) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if "pip install" in line]


def test_setup_installs_torch_first_then_the_pinned_rest_and_says_where(fake: Setup) -> None:
    code, output = fake.run()
    assert code == 0, output
    assert f"using {fake.environment}" in output
    torch, tools, rest = fake.installs()
    assert torch.split()[-1].startswith("torch==")
    assert "-c" in tools.split()
    assert f"-e {fake.checkout}[dev]" in rest
    assert len(output.splitlines()) <= 6


def test_a_second_setup_does_nothing_in_less_than_a_second(fake: Setup) -> None:
    fake.run()
    fake.calls.unlink()
    began = time.perf_counter()
    assert fake.run() == (0, "")
    assert time.perf_counter() - began < 1
    assert not fake.calls.exists()


def test_changed_pins_are_installed(fake: Setup) -> None:
    fake.run()
    fake.calls.unlink()
    with (fake.checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    fake.run()
    assert fake.installs()


def test_a_failed_setup_shows_the_logs_end_and_is_tried_again(fake: Setup) -> None:
    failing = fake.calls.with_name("calls.fail")
    failing.touch()
    code, output = fake.run()
    assert code not in (0, None)
    assert "pip says" in output
    assert "install.log" in output
    failing.unlink()
    assert fake.run()[0] == 0


def test_two_setups_at_once_install_once(fake: Setup) -> None:
    both = [fake.start(), fake.start()]
    for process in both:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    assert len(fake.installs()) == 3


def test_torch_index_url_is_passed_on(fake: Setup) -> None:
    fake.run(TORCH_INDEX_URL="file:///an/index")
    assert "--index-url file:///an/index torch==" in fake.installs()[0]


def test_without_python_the_message_says_what_to_install(fake: Setup, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "sed", "cat", "cksum", "mkdir", "flock", "dirname", "basename"):
        found = next(Path(part) / name for part in os.environ["PATH"].split(":")
                     if (Path(part) / name).exists())  # fmt: skip
        (tools / name).symlink_to(found)
    code, output = fake.run(PATH=str(tools), VIRTUAL_ENV="", CONDA_PREFIX="")
    assert code == 2
    assert "Python 3.10 or newer" in output
