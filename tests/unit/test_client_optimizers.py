"""Muon and apex's LAMB as the trainer makes them; Muon's update held to torch's own."""

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from stacking.client_optimizers import optimizer_maker, plain_kernels
from stacking.deepspeed_config import ClientOptimizer
from stacking.errors import ConfigError
from stacking.parameter_groups import ParameterGroup

NUMBERS = {"lr": 0.0, "betas": [0.8, 0.97], "eps": 1e-7}
MUON = ClientOptimizer("muon", {**NUMBERS, "momentum": 0.9, "ns_method": "gram"})
RATE, DECAY, STEPS = 3e-3, 0.1, 4
SHAPES = [(36, 12), (12, 12), (12, 40)]


class Holder(nn.Module):
    """Three matrices of the layers and a bias."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.matrices = nn.ParameterList(torch.randn(*s, generator=generator) for s in SHAPES)
        self.bias = nn.Parameter(torch.randn(7, generator=generator))


def groups() -> list[ParameterGroup]:
    names = [f"matrices.{index}" for index in range(3)]
    return [
        *(ParameterGroup(DECAY, 0, False, (name,), shape[1])
          for name, shape in zip(names, SHAPES, strict=True)),
        ParameterGroup(0.0, 0, False, ("bias",)),
    ]  # fmt: skip


def way(holder: Holder, *optimizers: torch.optim.Optimizer) -> dict[str, Tensor]:
    """How far each parameter is moved by some steps on given gradients."""
    named = dict(holder.named_parameters())
    start = {name: p.detach().clone() for name, p in named.items()}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    return {name: p.detach() - start[name] for name, p in named.items()}


def made_muon(holder: Holder) -> torch.optim.Optimizer:
    """As the engine makes it and writes its rates."""
    maker = optimizer_maker(MUON)
    assert maker is not None
    found = maker([group.for_optimizer(holder) for group in groups()])
    for given, ours in zip(found.param_groups, groups(), strict=True):
        given["lr"] = RATE * ours.rate_factor
    return found


def test_muon_is_torchs_muon_with_adams_rate_and_torchs_adamw_for_the_rest() -> None:
    ours, theirs = Holder(), Holder()
    with plain_kernels(MUON):
        moved = way(ours, made_muon(ours))
    muon = torch.optim.Muon(theirs.matrices, lr=RATE, weight_decay=DECAY, momentum=0.9,
                            adjust_lr_fn="match_rms_adamw")  # fmt: skip
    adam = torch.optim.AdamW([theirs.bias], RATE, betas=(0.8, 0.97), eps=1e-7, weight_decay=0)
    expected = way(theirs, muon, adam)
    torch.testing.assert_close(moved.pop("bias"), expected["bias"])
    for name, here in moved.items():  # torch iterates in bfloat16
        assert float((here - expected[name]).norm() / expected[name].norm()) < 0.02


def test_zero_sees_which_parameters_are_muons() -> None:
    holder = Holder()
    made_muon(holder)
    tags = {name: vars(parameter)["use_muon"] for name, parameter in holder.named_parameters()}
    assert tags == {name: name != "bias" for name in tags}


def test_muons_kernels_are_not_compiled() -> None:
    """A compiler would take half a minute, or not be there; a ninth shape would run otherwise."""
    compiled: list[object] = []

    def backend(graph: object, inputs: object) -> object:
        compiled.append(graph)
        return graph

    torch.compiler.reset()
    function = torch.compile(lambda x: x + 1, backend=backend)
    with plain_kernels(MUON):
        function(torch.ones(2))
        holder = Holder()
        way(holder, made_muon(holder))
        counters = torch._dynamo.utils.counters
    assert compiled == []
    assert not counters["stats"].get("unique_graphs")
    with plain_kernels(None):
        function(torch.ones(2))
    assert len(compiled) == 1


def test_what_deepspeed_makes_itself_is_left_to_it() -> None:
    assert optimizer_maker(None) is None


def apex(monkeypatch: pytest.MonkeyPatch, is_available: bool) -> list[dict[str, object]]:
    """A package of that name; what its FusedLAMB is made with."""
    made: list[dict[str, object]] = []

    def lamb(groups: object, **numbers: object) -> None:
        made.append({"groups": groups, **numbers})

    modules = {
        "apex": ModuleType("apex"),
        "apex.optimizers": SimpleNamespace(FusedLAMB=lamb),
        "apex.multi_tensor_apply": SimpleNamespace(
            multi_tensor_applier=SimpleNamespace(available=is_available)
        ),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_apexes_lamb_gets_the_recipes_numbers_and_never_clips(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = apex(monkeypatch, is_available=True)
    maker = optimizer_maker(ClientOptimizer("apex_lamb", NUMBERS))
    assert maker is not None
    maker([{"params": [], "weight_decay": 0.3}])
    groups = [{"params": [], "weight_decay": 0.3}]
    assert made == [{"groups": groups, **NUMBERS, "max_grad_norm": math.inf}]


@pytest.mark.parametrize("is_there", [False, True])
def test_apex_without_its_kernels_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    if is_there:
        apex(monkeypatch, is_available=False)
    with pytest.raises(ConfigError, match=r"apex\.fused_lamb: NVIDIA apex .*another project"):
        optimizer_maker(ClientOptimizer("apex_lamb", NUMBERS))
