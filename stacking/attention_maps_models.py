"""A run's checkpoints, or a Hugging Face folder, as models whose attention is shown."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stacking.attention_maps import ModelAttention, Sentence, measure
from stacking.checkpoint import Checkpoint, CheckpointManager
from stacking.config import Recipe
from stacking.config_loading import load_recipe
from stacking.errors import CheckpointError, ConfigError
from stacking.growth.depth import DEPTH_OPERATORS
from stacking.hf import load_pretrained, read_home
from stacking.hf_tokenizer import DIGEST_FIELD, TOKENIZER
from stacking.modeling import BertForPreTraining
from stacking.pretrained import checkpoint_model, require_tokenizer
from stacking.resume import state_for


@dataclass(frozen=True)
class Model:
    """One model, not loaded yet; fields as in ModelAttention."""

    name: str
    caption: str
    origins: tuple[int | None, ...]
    load: Callable[[], BertForPreTraining]


@dataclass(frozen=True)
class Source:
    """What is shown.

    Attributes:
        models: in the order of training.
        tokenizer: file or folder of the tokenizer that they were trained with.
        longest: tokens of a sentence that all of them take.
        notes: what was left out, for people.
    """

    models: tuple[Model, ...]
    tokenizer: Path
    longest: int
    notes: tuple[str, ...] = ()

    def attention(self, shown: Sentence, sentences: Sequence[Sentence]) -> Iterator[ModelAttention]:
        """Of each model in turn, of which only one is in memory; arguments as `measure` has."""
        for model in self.models:
            maps, shares, uniform = measure(model.load(), shown, sentences)
            yield ModelAttention(model.name, model.caption, maps, shares, uniform, model.origins)


def find_models(folder: Path, tags: Sequence[str], *, all_switches: bool = False) -> Source:
    """The checkpoints of a run folder, or the one model of a Hugging Face folder.

    Without `tags` those around the last switch that changed the model and the newest; with
    `all_switches` around each such switch. UserError where there is none, or one with pooling.
    """
    if (folder / "recipe.json").is_file():
        return _of_run(folder, tags, all_switches)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: neither a run folder (no recipe.json) nor a Hugging Face folder (no "
            "config.json)"
        )
    if tags or all_switches:
        raise ConfigError(
            f"{folder}: is a Hugging Face folder, one model without tags; leave out --tags and "
            "--all-switches"
        )
    return _of_folder(folder)


def layer_origins(recipe: Recipe, first: int, stage: int) -> tuple[int | None, ...]:
    """For each layer of `stage` the layer of stage `first` <= `stage` that it came from.

    None: it began at random. Where growth was learned, as if by stack, from which it starts.
    """
    origins: list[int | None] = list(range(recipe.stages[first].num_hidden_layers))
    for index in range(first + 1, stage + 1):
        entered = recipe.stages[index]
        operator = DEPTH_OPERATORS["stack" if entered.learned else entered.depth]
        layers = operator.layers(len(origins), entered.num_hidden_layers)
        origins = [None if layer is None else origins[layer] for layer in layers]
    return tuple(origins)


def _of_run(run_dir: Path, tags: Sequence[str], all_switches: bool) -> Source:
    recipe = load_recipe(run_dir / "recipe.json")
    found = _checkpoints(CheckpointManager(run_dir / "checkpoints"), recipe, tags, all_switches)
    stages = {checkpoint.tag: state_for(checkpoint, recipe).stage for checkpoint in found}
    shown = [c for c in found if recipe.stage_model(stages[c.tag]).pooling == "none"]
    pooled = ", ".join(c.tag for c in found if c not in shown)
    why = f"{pooled}: trained with pooling, so that the rows of its layers are no tokens"
    if pooled and (tags or not shown):
        raise ConfigError(f"{why}; name other checkpoints with --tags")
    models = tuple(
        Model(
            name=checkpoint.tag,
            caption=f"step {checkpoint.state.global_step:,}, {len(origins)} layers",
            origins=origins,
            load=partial(checkpoint_model, checkpoint, recipe),
        )
        for checkpoint in shown
        for origins in [layer_origins(recipe, stages[shown[0].tag], stages[checkpoint.tag])]
    )
    _require_own(run_dir / "tokenizer" / TOKENIZER, found[-1].state.tokenizer_sha256, run_dir)
    longest = min(recipe.stage_data(stages[c.tag]).max_seq_length for c in shown)
    notes = (f"left out: {why}",) if pooled else ()
    return Source(models, run_dir / "tokenizer", longest, notes)


def _checkpoints(
    manager: CheckpointManager, recipe: Recipe, tags: Sequence[str], all_switches: bool
) -> list[Checkpoint]:
    """Those that are asked for, in the order of training."""
    committed = manager.committed()
    if not committed:
        broken = manager.latest_good()[1]
        reason = f"none can be read: {broken[0]}" if broken else "none is committed; train first"
        raise CheckpointError(f"{manager.folder}: {reason}")
    if tags:
        chosen = {manager.load(tag).tag for tag in tags}
    else:
        chosen = _around_switches({c.tag for c in committed}, recipe, all_switches)
        chosen.add(committed[-1].tag)
    return [checkpoint for checkpoint in committed if checkpoint.tag in chosen]


def _around_switches(tags: Collection[str], recipe: Recipe, all_switches: bool) -> set[str]:
    """Both sides of the last switch that changed the model, or of each."""
    sides = [
        {f"stage{stage}_end", f"stage{stage + 1}_begin"}
        for stage in range(len(recipe.stages) - 1, 0, -1)
        if recipe.stage_model(stage - 1) != recipe.stage_model(stage)
    ]
    saved = [pair for pair in sides if pair <= set(tags)]
    return set().union(*(saved if all_switches else saved[:1]))


def _of_folder(folder: Path) -> Source:
    model, config = load_pretrained(folder)
    digest = str(read_home(folder)[1].get(DIGEST_FIELD) or "")
    _require_own(folder / TOKENIZER, digest, folder)
    layers = config.num_hidden_layers
    only = Model(folder.resolve().name, f"{layers} layers", tuple(range(layers)), lambda: model)
    return Source((only,), folder / "tokenizer.json", config.max_position_embeddings)


def _require_own(tokenizer: Path, digest: str, folder: Path) -> None:
    """ConfigError where the model says another tokenizer than the one that lies there."""
    if tokenizer.is_file():
        require_tokenizer(tokenizer.read_bytes(), digest, tokenizer, folder)
