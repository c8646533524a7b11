"""What reads damaged files, and what must hold if it takes them: one function for each kind.

Each returns "accepted", or "refused" for a UserError; everything else that is raised is a fault.
"""

import contextlib
import hashlib
import io
import json
import math
import runpy
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from fuzz_forked import train_forked
from fuzz_shards import ShardEdit, edit_shard
from fuzz_world import SPLITS, STEPS, sign_data
from fuzzing import FileEdit, edit_file
from launching import LAUNCH

from stacking.checkpoint import MARKER, Checkpoint, CheckpointManager
from stacking.config import Recipe
from stacking.config_loading import load_recipe, resolved_json
from stacking.cost import num_parameters
from stacking.dataset import MaskedLMBatch
from stacking.deepspeed_config import (
    Accelerator,
    load_deepspeed_config,
    place_monitors,
    resolve_stages,
)
from stacking.errors import ConfigError, UserError
from stacking.growth.contract import parameter_shapes
from stacking.growth.legality import recipe_faults
from stacking.modeling import BertForPreTraining
from stacking.report import read_metrics, summarize
from stacking.resume import snapshot_for
from stacking.run_data import RunData
from stacking.run_folder import RunFolder, recipe_sha256
from stacking.schedule import stage_rates, stage_start
from stacking.snapshot import Snapshot

MOST_PARAMETERS = 2**42
CPU = Accelerator("cpu", supports_fp16=False, supports_bf16=True, fused_adam=False)
GPU = Accelerator("cuda", supports_fp16=True, supports_bf16=True, fused_adam=True)


@dataclass(frozen=True)
class Case:
    """One damaged world: which file of which base, how, and whether hashes were made anew."""

    target: str
    base: int = 0
    file: int = 0
    edits: tuple[FileEdit | ShardEdit, ...] = ()
    is_signed: bool = False
    words: tuple[str, ...] = field(default=())


def run_case(world: Path, scratch: Path, case: Case) -> str:
    """Do the damage in a copy and let the target read it."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            TARGETS[case.target](world, scratch, case)
    except UserError as error:
        _check_message(str(error))
        return "refused"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return "accepted"


def _check_message(message: str) -> None:
    assert message.strip(), "a refusal without a word"
    assert "Traceback" not in message, message
    assert len(message) < 20_000, f"a refusal of {len(message)} characters: {message[:300]}"


# -- recipes and engine JSONs ------------------------------------------------------------------


def _recipe(world: Path, scratch: Path, case: Case) -> None:
    path = _copied(world / "recipes", case, scratch)
    recipe = load_recipe(path, case.words)
    (scratch / "again.json").write_text(resolved_json(recipe))
    again = load_recipe(scratch / "again.json")
    assert again == recipe, "the recipe does not survive being written"
    assert recipe_sha256(again) == recipe_sha256(recipe)
    if faults := recipe_faults(recipe):
        raise ConfigError(faults)
    _check_schedule(recipe)
    for index in range(len(recipe.stages)):
        model = recipe.stage_model(index)
        assert num_parameters(model) <= MOST_PARAMETERS, f"{num_parameters(model):,} parameters"
        if model.num_hidden_layers <= 32:
            shapes = parameter_shapes(model).values()
            assert sum(shape.numel() for shape in shapes) == num_parameters(model)
    _check_plan(path, case.words)


def _check_schedule(recipe: Recipe) -> None:
    ends = [stage_start(stage, recipe.stages) for stage in range(len(recipe.stages) + 1)]
    steps = {0, ends[-1] - 1, ends[-1] // 2, *ends[1:-1], *(end - 1 for end in ends[1:])}
    for step in sorted(steps):
        rates = stage_rates(recipe, step)
        assert all(math.isfinite(rate) and rate >= 0 for rate in rates), f"step {step}: {rates}"


def _check_plan(path: Path, words: Sequence[str]) -> None:
    changes = [word for change in words for word in ("--set", change)]
    text = _main("plan.py", "--recipe", path, "--json", *changes)
    plan = json.loads(text, parse_constant=_no_constant)
    assert plan["stages"], text
    _main("plan.py", "--recipe", path, *changes)


def _no_constant(name: str) -> float:
    raise AssertionError(f"{name} in a plan")


def _engine(world: Path, scratch: Path, case: Case) -> None:
    path = _copied(world / "engines", case, scratch)
    config = load_deepspeed_config(path)
    recipe = load_recipe(world / "recipes" / "small.json")
    refusals = []
    for accelerator, world_size in ((CPU, 1), (GPU, 1), (GPU, 2)):
        try:
            resolved = resolve_stages(
                config, recipe, world_size=world_size, accelerator=accelerator,
                strict_precision=False,
            )  # fmt: skip
        except ConfigError as error:
            refusals.append(error)
            continue
        for stage in resolved:
            placed = place_monitors(stage, scratch)
            json.dumps(placed.deepspeed, allow_nan=False)
            product = stage.micro_batch_size * stage.gradient_accumulation_steps * world_size
            assert product == recipe.global_batch_size == placed.deepspeed["train_batch_size"]
            assert '"auto"' not in json.dumps(placed.deepspeed)
    if len(refusals) == 3:
        raise refusals[0]


# -- data ------------------------------------------------------------------------------------------


def _ours(world: Path, scratch: Path, case: Case) -> None:
    """Damaged data with a manifest: refused, or the very same batches."""
    folder = _damaged_data(world / "ours", scratch, case)
    batches = _batches(folder, world, "dynamic", case.base % 2 == 1)
    if case.is_signed:
        return  # anything may be in there now, as long as the model can read it
    assert batches == _pristine_batches(world, "dynamic", case.base % 2 == 1), "other batches"


def _nvidia(world: Path, scratch: Path, case: Case) -> None:
    """Damaged data without hashes: refused, or something that the model can read."""
    _batches(_damaged_data(world / "nvidia", scratch, case), world, "static", False)


def _damaged_data(source: Path, scratch: Path, case: Case) -> Path:
    folder = scratch / "data"
    shutil.copytree(source, folder)
    files = sorted(folder.iterdir())
    path = files[case.file % len(files)]
    shards = [edit for edit in case.edits if isinstance(edit, ShardEdit)]
    if shards and path.suffix != ".hdf5":
        path = folder / "training_00000.hdf5"
    for edit in shards:
        edit_shard(path, edit)
    _edit(path, case, files)
    if case.is_signed and source.name == "ours" and all(map(Path.is_file, files)):
        sign_data(folder)
    return folder


@lru_cache(maxsize=8)
def _pristine_batches(world: Path, masking: str, whole_word: bool) -> str:
    folder = world / ("nvidia" if masking == "static" else "ours")
    return _batches(folder, world, masking, whole_word)


def _batches(folder: Path, world: Path, masking: str, whole_word: bool) -> str:
    """A digest of all that a run reads of its data; a model computes on everything once."""
    words = [f"data.masking={masking}", f"data.whole_word={json.dumps(whole_word)}"]
    recipe = load_recipe(world / "recipes" / "small.json", words)
    data = RunData(recipe, folder)
    digest = hashlib.sha256()
    # Nothing signs token_counts.npy, from which nothing follows but this number.
    loss = data.unigram_loss()
    assert loss is None or (math.isfinite(loss) and loss > 0), f"unigram loss {loss}"
    with data.loader(0, 2) as loader:
        for _ in range(5):  # 20 rows: an epoch
            _read(next(loader), recipe, digest)
    _read(data.validation(1), recipe, digest)
    _read([data.probe(1, torch.device("cpu")).batch], recipe, digest)
    return digest.hexdigest()


def _read(batches: Iterable[MaskedLMBatch], recipe: Recipe, digest: "hashlib._Hash") -> None:
    for batch in batches:
        for name, tensor in batch.inputs().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        with torch.no_grad():
            output = _model(resolved_json(recipe))(**batch.inputs())
        assert bool(torch.isfinite(output["mlm_loss_sum"])), "a loss that is not finite"


@lru_cache(maxsize=4)
def _model(recipe: str) -> BertForPreTraining:
    torch.manual_seed(0)
    return BertForPreTraining(Recipe.model_validate_json(recipe).stage_model(1)).eval()


# -- runs ------------------------------------------------------------------------------------------


def _run(world: Path, scratch: Path, case: Case) -> None:
    """A damaged run folder: what is loaded is what was saved, bit by bit."""
    folder, recipe = _damaged_run(world, scratch, case)
    run_folder = RunFolder(folder)
    run_folder.check(recipe, "auto")
    manager = CheckpointManager(run_folder.checkpoints, recipe.checkpoint.keep_last)
    newest, complaints = manager.latest_good()
    for complaint in complaints:
        _check_message(complaint)
    refusals: list[UserError] = []
    for tag in sorted({*STEPS, *case.words, *([newest.tag] if newest else [])}):
        try:
            checkpoint = manager.load(tag)
            _check_checkpoint(checkpoint, world, recipe, case)
        except UserError as error:
            _check_message(str(error))
            refusals.append(error)
    run_folder.create(recipe, world / "ours")
    if refusals:
        raise refusals[0]


def _damaged_run(world: Path, scratch: Path, case: Case) -> tuple[Path, Recipe]:
    folder = scratch / "run"
    shutil.copytree(world / "run", folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    files = [path for path in files if path.name != "metrics.jsonl"]
    path = files[case.file % len(files)]
    _edit(path, case, files)
    if case.is_signed and path.parent.parent.name == "checkpoints" and path.name != MARKER:
        _sign_tag(path.parent)
    return folder, load_recipe(world / "run" / "recipe.json")


def _sign_tag(tag: Path) -> None:
    """The marker with the hashes of the files as they are now."""
    files = {}
    for path in sorted(tag.iterdir()):
        if path.name != MARKER and path.is_file() and path.stat().st_size < 2**20:
            content = path.read_bytes()
            files[path.name] = {
                "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()
            }  # fmt: skip
    (tag / MARKER).write_text(json.dumps({"tag": tag.name, "files": files}))


def _check_checkpoint(checkpoint: Checkpoint, world: Path, recipe: Recipe, case: Case) -> None:
    snapshot = snapshot_for(checkpoint, recipe)
    if not case.is_signed:
        original = CheckpointManager(world / "run" / "checkpoints").load(checkpoint.tag)
        assert checkpoint.state == original.state, "another state"
        _check_same(snapshot, original.snapshot())


def _check_same(ours: Snapshot, theirs: Snapshot) -> None:
    assert ours.optimizer_steps == theirs.optimizer_steps
    assert ours.without_tensors() == theirs.without_tensors()
    for mine, other in (
        (ours.weights, theirs.weights),
        *((ours.moments.get(key, {}), theirs.moments.get(key, {})) for key in theirs.moments),
    ):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine), "other numbers"


def _metrics(world: Path, scratch: Path, case: Case) -> None:
    path = scratch / "metrics.jsonl"
    shutil.copy(world / "run" / "metrics.jsonl", path)
    _edit(path, case, [path])
    run = read_metrics(path)
    assert summarize(run).text()
    if case.base % 50 == 0:  # the page takes a second
        _main("report.py", scratch, "--json")


def _export(world: Path, scratch: Path, case: Case) -> None:
    folder, _ = _damaged_run(world, scratch, case)
    _main("export.py", folder, "--out", scratch / "exported", "--json")


def _train(world: Path, scratch: Path, case: Case) -> None:
    """A damaged recipe or engine JSON goes through launch/pretrain.py, for a few steps."""
    recipes = sorted(path.name for path in (world / "recipes").iterdir())
    name = ("learned.json", "rich.json", "small.json")[case.base % 3]  # those that fit the data
    case = replace(case, base=recipes.index(name))
    damaged = _copied(
        world / "recipes", case if case.file % 2 else replace(case, edits=()), scratch
    )
    engine = scratch / "engine.json"
    names = ("rich", "cpu_fp32", "cpu_bf16", "zero3_fp16")
    shutil.copy(world / "engines" / f"{names[case.file // 2 % len(names)]}.json", engine)
    if case.file % 2 == 0:
        _edit(engine, case, [engine])
    recipe = load_recipe(damaged)
    if num_parameters(recipe.model) > 10**6 or recipe.data.max_seq_length > 64:
        raise UserError("legal, but too large to be trained here")
    code, text = train_forked(
        "--recipe", damaged, "--deepspeed_config", engine, "--data", world / "ours",
        "--run-dir", scratch / "run", "--max-steps", 5, "--time-limit", "60s",
    )  # fmt: skip
    assert "Traceback" not in text, text[-6000:]
    assert code in (0, 2, 3), f"exit code {code}: {text[-3000:]}"
    if code == 2:
        assert "error: " in text, text
        raise UserError(text[-3000:])
    assert CheckpointManager(scratch / "run" / "checkpoints").latest_good()[0] is not None


# -- commands --------------------------------------------------------------------------------------


def _main(name: str, *arguments: object) -> str:
    """Run launch/NAME's main in this process; its output. UserError for exit code 2."""
    main = _entry(name)
    output, errors = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main()
    except SystemExit as end:
        code = int(str(end.code))
    finally:
        sys.argv = before
    assert "Traceback" not in errors.getvalue(), errors.getvalue()
    if code == 2:
        raise UserError(errors.getvalue())
    assert code == 0, f"exit code {code}: {errors.getvalue()}"
    return output.getvalue()


@lru_cache(maxsize=8)
def _entry(name: str) -> Callable[[], int]:
    main: Callable[[], int] = runpy.run_path(str(LAUNCH / name), run_name="fuzzed")["main"]
    return main


def _edit(path: Path, case: Case, others: Sequence[Path]) -> None:
    edits = [edit for edit in case.edits if not isinstance(edit, ShardEdit)]
    edit_file(path, edits, others)


def _copied(folder: Path, case: Case, scratch: Path) -> Path:
    """A damaged copy of one of a folder's files."""
    files = sorted(folder.iterdir())
    source = files[case.base % len(files)]
    path = scratch / source.name
    shutil.copy(source, path)
    _edit(path, case, [path])
    return path


TARGETS: dict[str, Callable[[Path, Path, Case], None]] = {
    "recipe": _recipe,
    "engine": _engine,
    "ours": _ours,
    "nvidia": _nvidia,
    "run": _run,
    "metrics": _metrics,
    "export": _export,
    "train": _train,
}
assert set(SPLITS) == {"training", "validation"}
