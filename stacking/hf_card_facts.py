"""What a run folder kept of itself, for the model card of its export.

Whatever is missing or cannot be read is None: a card says so, and the export goes on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.shard_format import Manifest, read_manifest
from stacking.checkpoint import Checkpoint, TrainState
from stacking.config import Recipe
from stacking.config_loading import load_recipe, read_json_object
from stacking.errors import ConfigError, UserError
from stacking.report_metrics import EvaluationRow, RunMetrics, read_metrics
from stacking.resume import state_for

NOT_KNOWN = "not known"
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")


@dataclass(frozen=True)
class RunFacts:
    """What the card tells of the run; None: the run did not keep it."""

    recipe: Recipe
    tag: str
    state: TrainState
    optimizer: str
    metrics: RunMetrics | None
    manifest: Manifest | None
    data_license: str | None
    languages: tuple[str, ...]

    @property
    def beginning(self) -> str:
        """The first weights, shortly: no path of the machine that trained."""
        if self.metrics is None:
            return NOT_KNOWN
        folder = self.metrics.start.start_from
        return f"the weights of {Path(folder).name}" if folder else "random weights"

    @property
    def evaluation(self) -> EvaluationRow | None:
        """The last evaluation of the exported stage up to the exported step."""
        state, rows = self.state, self.metrics.evaluations if self.metrics else ()
        found = [r for r in rows if r.stage == state.stage and r.global_step <= state.global_step]
        return found[-1] if found else None


def run_facts(
    run_dir: Path, checkpoint: Checkpoint, data_license: str | None, languages: Sequence[str]
) -> RunFacts:
    """Read a run folder; ConfigError where licence or languages are not what a card can say."""
    faults = [
        f"--language {language}: allowed: codes of two or three letters, for example en"
        for language in languages
        if not _LANGUAGE.fullmatch(language)
    ]
    if data_license is not None and not one_line(data_license):
        faults.append("--data-license: got no text; allowed: a name, for example cc-by-sa-4.0")
    if faults:
        raise ConfigError(faults)
    recipe = load_recipe(run_dir / "recipe.json")
    state = state_for(checkpoint, recipe)
    return RunFacts(
        recipe, checkpoint.tag, state, _optimizer(run_dir, state.stage), _metrics(run_dir),
        _manifest(run_dir), data_license, tuple(languages),
    )  # fmt: skip


def one_line(text: str) -> str:
    """Without line breaks and characters that cannot be seen."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _optimizer(run_dir: Path, stage: int) -> str:
    """The type in the DeepSpeed JSON of the stage."""
    try:
        stages = read_json_object(run_dir / "deepspeed.json").get("stages")
        return str(stages[stage]["optimizer"]["type"])  # type: ignore[index]
    except (UserError, KeyError, IndexError, TypeError):
        return f"optimizer {NOT_KNOWN}"


def _metrics(run_dir: Path) -> RunMetrics | None:
    try:
        return read_metrics(run_dir / "metrics.jsonl")
    except UserError:
        return None


def _manifest(run_dir: Path) -> Manifest | None:
    try:
        return read_manifest(run_dir)
    except UserError:
        return None
