"""Tasks, seeds and perhaps a grid in; the jobs that are left, done; their results out.

A job whose result is on disk is not done again. With a grid each task is first tried with every
setting of the paper and one seed; the seeds that are reported are others and use the best setting.
The paper searches with its baseline, and its other models use what that found.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path

from stacking.errors import ConfigError
from stacking.fine_tuning import Setting
from stacking.fine_tuning_jobs import FLAG_OF, Asked, Start, read_finished
from stacking.glue_data import GlueError, find_file, missing_files, read_glue
from stacking.glue_metrics import Scores, score_rows, select, task_score
from stacking.glue_predictions import constant_predictions, submission_file, write_submission
from stacking.glue_tasks import BY_NAME, SPLITS, TASKS, GlueRecipe, GlueTask, GridPoint, grid
from stacking.glue_training import GlueJob, GlueResult, read_result, run_job
from stacking.side_by_side import side_by_side

GRID_SEED = 0
"""Of the runs that select; the seeds that are reported begin at 1."""
Tell = Callable[[GlueResult, int, int], None]
"""Told of each finished job, how many are done and how many there are."""


@dataclass(frozen=True)
class GlueRequest:
    """What is asked for."""

    start: Start
    asked: Asked
    glue: Path
    out: Path
    tasks: tuple[GlueTask, ...]
    grid: bool = False
    """Whether the settings are searched on dev first."""
    grid_from: Path | None = None
    """The `out` of another model whose grid found them."""

    def __post_init__(self) -> None:
        """ConfigError with all faults."""
        grids = ["--grid"] * self.grid + ["--grid-from"] * (self.grid_from is not None)
        searched = [field.name for field in fields(GridPoint)]
        given = [FLAG_OF[name] for name in self.asked.settings if name in searched]
        if len(grids) > 1:
            raise ConfigError("--grid searches, --grid-from does not; leave out one or the other")
        if grids and given:
            raise ConfigError(f"{grids[0]} finds {', '.join(given)}; leave out one or the other")

    def job(self, task: GlueTask, seed: int, folder: Path) -> GlueJob:
        """With the task's recipe, but for what is asked otherwise."""
        assert task.recipe is not None
        return GlueJob(
            task.name, seed, self._setting(task.recipe), folder, self.start, self.glue,
            task.recipe.max_seq_length,
        )  # fmt: skip

    def _setting(self, recipe: GlueRecipe) -> Setting:
        own = Setting(
            recipe.num_epochs, recipe.batch_size, recipe.learning_rate, recipe.warmup_share,
            recipe.weight_decay,
        )  # fmt: skip
        return replace(own, **self.asked.settings)  # type: ignore[arg-type]


@dataclass(frozen=True)
class GlueOutcome:
    """What was trained."""

    results: tuple[GlueResult, ...]
    """In the order of tasks, then seeds."""
    tried: dict[str, dict[GridPoint, float]]
    """Of a grid: what each setting scores on dev, by the task; else empty."""
    skipped: dict[str, str]
    """Tasks by name that were not trained, each with the reason."""
    constants: dict[str, float]
    """Of these the ones with one answer for every row: the number that it has on dev, in per cent.
    """

    @property
    def chosen(self) -> dict[str, GridPoint]:
        """Of a grid: the setting of each task."""
        return {task: select(scores) for task, scores in self.tried.items()}

    def metrics(self, task: str) -> dict[str, list[float]]:
        """Each of the task's metrics of each seed, in per cent."""
        found = [result.scores for result in self.results if result.job.task == task]
        return {name: [scores[name] for scores in found] for name in BY_NAME[task].metrics}

    def scores(self, task: str) -> list[float]:
        """The task's one number of each seed, in per cent."""
        found = [result for result in self.results if result.job.task == task]
        return [task_score(BY_NAME[task], result.scores) for result in found]


def file_notes(request: GlueRequest) -> list[str]:
    """What is to be told of the tasks' files, and which test files are missing.

    GlueError where a file is none: before hours are spent on the others.
    """
    read = {task.name for task in request.tasks
            if task.constant is not None or not _reason(request.glue, task)}  # fmt: skip
    notes = []
    for task, split in product(TASKS, SPLITS):
        if not {task.name, task.predicted_by} & read:
            continue
        if find_file(request.glue, task, split) is not None:
            notes += read_glue(request.glue, task, split).notes()
        elif split == "test":
            notes.append(f"{request.glue / task.test.path} is missing: no {submission_file(task)} "
                         "for the leaderboard")  # fmt: skip
    return notes


def fine_tune_all(request: GlueRequest, tell: Tell) -> GlueOutcome:
    """Train what is not yet trained; UserError where nothing can be, or --out holds other runs."""
    reasons = {task.name: _reason(request.glue, task) for task in request.tasks}
    tasks = [task for task in request.tasks if not reasons[task.name]]
    skipped = {name: reason for name, reason in reasons.items() if reason}
    if not tasks:
        told = "\n".join(f"  - {name}: {reason}" for name, reason in skipped.items())
        raise GlueError(f"no task can be trained:\n{told}")
    tried = _tried(request, tasks, tell)
    jobs = []
    for task in tasks:
        for seed in request.asked.seeds:
            job = request.job(task, seed, request.out / f"seed_{seed}")
            jobs.append(_at(job, select(tried[task.name])) if tried else job)
    results = _run(jobs, request.asked.processes, tell)
    return GlueOutcome(tuple(results), tried, skipped, _constants(request))


def _tried(
    request: GlueRequest, tasks: Sequence[GlueTask], tell: Tell
) -> dict[str, dict[GridPoint, float]]:
    """The dev score of each task with each setting; {} without a grid."""
    if not request.grid and request.grid_from is None:
        return {}
    points, folder = grid(), (request.grid_from or request.out) / "grid"
    jobs = [
        replace(_at(request.job(task, GRID_SEED, folder / _name(point)), point),
                predicts_test=False, label=f"with {point}")
        for task in tasks for point in points
    ]  # fmt: skip
    found = (
        [result.scores for result in _run(jobs, request.asked.processes, tell)]
        if request.grid else [_of_another_model(job) for job in jobs]
    )  # fmt: skip
    scores = iter(found)
    return {
        task.name: {point: task_score(task, next(scores)) for point in points} for task in tasks
    }


def _of_another_model(job: GlueJob) -> Scores:
    """Scores of a grid's finished run; ConfigError where it is not done, or of other data."""
    if not job.result.exists():
        raise ConfigError(
            f"--grid-from: {job.result} is missing; the grid of {job.task} is not done there: end "
            "it with --grid, or leave the task out"
        )
    return read_finished(job.result, job.conditions(), but=("model", "max_seq_length"))[0]


def _run(jobs: Sequence[GlueJob], processes: int, tell: Tell) -> list[GlueResult]:
    """The results of all jobs in their order; those on disk are read."""
    done = {job: found for job in jobs if (found := read_result(job)) is not None}
    left = [job for job in jobs if job not in done]
    for result in side_by_side(run_job, left, processes):
        done[result.job] = result
        tell(result, len(done), len(jobs))
    return [done[job] for job in jobs]


def _at(job: GlueJob, point: GridPoint) -> GlueJob:
    setting = replace(
        job.setting, num_epochs=point.num_epochs, batch_size=point.batch_size,
        learning_rate=point.learning_rate,
    )  # fmt: skip
    return replace(job, setting=setting)


def _name(point: GridPoint) -> str:
    return f"batch{point.batch_size}_rate{point.learning_rate:g}_epochs{point.num_epochs}"


def _reason(glue: Path, task: GlueTask) -> str:
    """Why a task cannot be trained, or ""."""
    if task.constant is not None:
        has_test = find_file(glue, task, "test") is not None
        return f"is not trained: {task.constant} is submitted for every row" if has_test else (
            f"is not trained, and {glue / task.test.path} is missing"
        )  # fmt: skip
    if task.predicted_by is not None:
        return f"is not trained: the model of {task.predicted_by} predicts it"
    lacking = missing_files(glue, [task], ("train", "dev")).get(task.name, [])
    deed = "are" if len(lacking) > 1 else "is"
    told = " and ".join(str(glue / name) for name in lacking)
    return f"{told} {deed} missing" if lacking else ""


def _constants(request: GlueRequest) -> dict[str, float]:
    """Write the predictions of tasks that nobody trains beside the others; their dev scores."""
    scores: dict[str, float] = {}
    constant = [task for task in request.tasks if task.constant is not None]
    for task, split in product(constant, SPLITS[1:]):
        if find_file(request.glue, task, split) is not None:
            part = read_glue(request.glue, task, split)
            said = constant_predictions(task, len(part.examples))
            for seed in request.asked.seeds:
                write_submission(request.out / f"seed_{seed}" / split, task, part.examples, said)
            if split == "dev":
                scores[task.name] = task_score(task, score_rows(part, said))
    return scores
