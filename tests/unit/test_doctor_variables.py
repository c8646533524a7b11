"""What reaches the other hosts is what the launcher sends them, crash for crash."""

import os
from pathlib import Path

import pytest
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.launcher import runner

from stacking import doctor_variables
from stacking.doctor import DEFAULT_PORT
from stacking.doctor_hostfile import DEFAULT_HOSTFILE
from stacking.doctor_variables import EnvFile, exports, forwarded, read_env_files, variable_findings


class Started:
    """Instead of the launcher's pdsh."""

    returncode = 0
    command: list[str]

    def __init__(self, command: list[str], env: object) -> None:
        Started.command = command

    def wait(self) -> int:
        return 0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a hostfile; nothing that the launcher does is real."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "DEEPSPEED_ENVIRONMENT_PATHS", [str(tmp_path)])
    monkeypatch.setattr(runner.subprocess, "Popen", Started)
    monkeypatch.setattr(runner.PDSHRunner, "backend_exists", lambda self: True)
    monkeypatch.setattr(runner.signal, "signal", lambda *_: None)
    monkeypatch.setattr(runner, "get_accelerator", CPU_Accelerator)
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    return tmp_path


def launch() -> list[str]:
    """The remote command as the launcher writes it."""
    runner.main(["-H", "hosts", "--no_ssh_check", "--master_addr", "10.0.0.1", "train.py"])
    return Started.command


def test_the_constants_are_the_launchers() -> None:
    assert list(doctor_variables.EXPORT_PREFIXES) == runner.EXPORT_ENVS
    assert {key: list(names) for key, names in doctor_variables.EXCLUDED.items()} == (
        runner.EXCLUDE_ENVS
    )
    prefixes = doctor_variables.ACCELERATOR_PREFIXES
    assert list(prefixes["cuda"]) == CUDA_Accelerator.export_envs(object())
    assert list(prefixes["cpu"]) == CPU_Accelerator.export_envs(object())
    assert DEFAULT_PORT == TORCH_DISTRIBUTED_DEFAULT_PORT
    assert str(DEFAULT_HOSTFILE) == runner.DLTS_HOSTFILE
    if "DS_ENV_FILE" not in os.environ:
        assert runner.DEEPSPEED_ENVIRONMENT_NAME == doctor_variables.FILE_NAME


@pytest.mark.parametrize("text", ["A=1\n\nB=2\n", "# note\n", "A=1\n  \n", "A\n", "A=1\n\n"])
def test_a_file_that_crashes_the_launcher_is_refused(folder: Path, text: str) -> None:
    (folder / ".deepspeed_env").write_text(text)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        launch()
    (fault,) = read_env_files([folder], ".deepspeed_env").faults
    assert (fault.status, "crashes" in fault.found) == ("fail", True)


def test_a_comment_with_an_equals_sign_hides_the_job_from_the_remote_shell(folder: Path) -> None:
    (folder / ".deepspeed_env").write_text("# A=1\n")
    line = " ".join(launch())
    assert "export # A=1; " in line.split("deepspeed.launcher.launch")[0]
    (fault,) = read_env_files([folder], ".deepspeed_env").faults
    assert "leaves out the whole job" in fault.found


def test_the_probe_runs_under_the_exports_of_the_launcher(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("PYTHON", "NCCL", "UCX", "MLFLOW", "MV2")):
            monkeypatch.delenv(name)
    values = {"PYTHONPATH": "/x:/y", "MLFLOW_RUN": "a b; c", "UCX_TLS": "tcp", "AISC_JOB_NAME": "j",
              "UCX_NET_DEVICES": "mlx", "NCCL_DEBUG": "INFO"}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    (folder / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nUCX_TLS = all\nA=x=y\nB=\n")
    files = read_env_files([folder], ".deepspeed_env")
    assert files.faults == []
    theirs = " ".join(launch()[launch().index("a,b") + 1 :]).split(" /")[0]
    ours = exports(dict(os.environ), files, "cpu", Path.cwd())
    assert sorted(_statements(ours)) == sorted(_statements(theirs))
    assert "NCCL_DEBUG" not in ours


def _statements(command: str) -> list[str]:
    return [part.strip() for part in command.split("; ") if part.strip().startswith("export")]


def test_a_later_file_changes_what_an_earlier_one_says(tmp_path: Path) -> None:
    for name, text in (("home", "A=1\nB=1\n"), ("here", "B=2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "env").write_text(text)
    files = read_env_files([tmp_path / "home", tmp_path / "here", tmp_path / "none"], "env")
    assert files.values == {"A": "1", "B": "2"}


def test_variables_that_matter_and_are_not_sent_are_named_without_values() -> None:
    here = {"WANDB_API_KEY": "secret", "HF_HOME": "/hf", "NCCL_DEBUG": "INFO", "PYTHONPATH": "/x",
            "SHELL": "/bin/sh", "DS_ENV_FILE": "e", "OMP_NUM_THREADS": "4",
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # fmt: skip
    files = EnvFile(values={"HF_HOME": "/hf"})
    (found,) = variable_findings(here, files, kind="cuda", num_hosts=2)
    assert found.status == "warn"
    assert found.found.endswith(": OMP_NUM_THREADS, WANDB_API_KEY")
    (found,) = variable_findings(here, files, kind="cpu", num_hosts=2)
    assert "NCCL_DEBUG" in found.found
    assert "secret" not in repr(found)
    assert variable_findings(here, files, kind="cpu", num_hosts=1) == []
    assert set(forwarded(here, "cuda")) == {"NCCL_DEBUG", "PYTHONPATH"}
