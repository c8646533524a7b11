"""The model card of an export: a run's records and the ExportReport in, README.md out.

What the run did not keep is said to be unknown. Names come from outside (files, recipes, licences):
they are written so that no character of theirs is Markdown, HTML or YAML.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence

import torch
import transformers

from stacking import __version__
from stacking.config import BertConfig, LearningRateConfig, Recipe
from stacking.cost import num_parameters
from stacking.errors import GrowthError
from stacking.hf import MAX_LOGIT_DIFFERENCE, ExportReport
from stacking.hf_card_facts import NOT_KNOWN, RunFacts, one_line
from stacking.hf_side_files import sealed
from stacking.report_metrics import RunStart
from stacking.stage_growth import StageGrowth

LICENSE_IDS = (
    "apache-2.0", "bsd-2-clause", "bsd-3-clause", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5",
    "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "gfdl", "gpl-3.0",
    "mit", "odbl", "odc-by", "pddl", "unlicense",
)  # fmt: skip
"""Of those that the Hugging Face Hub has names for, those of data; others are `other` there."""
_MOST_FILES = 200  # that the card lists one by one


def card(facts: RunFacts, report: ExportReport) -> str:
    """README.md."""
    lines = [
        *_head(facts, report),
        f"# {plain(facts.recipe.name)}",
        "",
        _summary(facts, report.config),
        *(["", plain(facts.recipe.description)] if facts.recipe.description else []),
        *_section("Model", _model(report)),
        *_section("Use", _use(report)),
        *_section("Training", _training(facts)),
        *_section("Data", _data(facts)),
        *_section("Losses", _losses(facts)),
        *_section("Check", [_check(report)]),
    ]
    return sealed("\n".join(lines) + "\n\n")


def plain(text: object) -> str:
    """Text on one line of which Markdown and HTML make nothing, also inside a table."""
    escaped = re.sub(r"([\\`*_{}\[\]<>|~#&$!@])", r"\\\1", one_line(str(text)))
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", escaped)  # no list and no heading


def _section(title: str, lines: Iterable[str]) -> list[str]:
    return ["", f"## {title}", "", *lines]


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """Cells are plain text or what `plain` made of it."""
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(str(cell) for cell in row)} |"


def _head(facts: RunFacts, report: ExportReport) -> Iterator[str]:
    """YAML that the Hugging Face Hub reads; values are names from here or checked ones."""
    yield "---"
    yield from _license_fields(facts.data_license)
    yield f"language: {json.dumps(facts.languages or ['und'])}"
    yield "library_name: transformers"
    yield "pipeline_tag: fill-mask"
    tags = ["bert", "masked-lm", "pre-training", "progressive-training"]
    tags += ["custom_code"] if report.needs_code else []
    yield f"tags: [{', '.join(tags)}]"
    yield "---"


def _license_fields(text: str | None) -> Iterator[str]:
    if text is None:
        yield "license: unknown"
        return
    name = re.sub(r"[^a-z0-9.]+", "-", one_line(text).lower()).strip("-.")
    if name in LICENSE_IDS:
        yield f"license: {name}"
    else:
        yield "license: other"
        yield f"license_name: {json.dumps(name or 'other')}"


def _summary(facts: RunFacts, config: BertConfig) -> str:
    depths = [stage.num_hidden_layers for stage in facts.recipe.stages[: facts.state.stage + 1]]
    grown = sorted(set(depths))
    history = "" if len(grown) == 1 else f", grown from {' over '.join(map(str, grown))} layers"
    began = "" if facts.beginning == NOT_KNOWN else f"from {plain(facts.beginning)} "
    return (
        f"A BERT of {config.num_hidden_layers} layers, {config.hidden_size:,} wide, pre-trained "
        f"{began}as a masked language model{history}."
    )


def _model(report: ExportReport) -> Iterator[str]:
    config = report.config
    where = "in this folder" if report.needs_code else "of transformers"
    dropped = {"num_nsp_labels": 0} if any("head dropped" in n for n in report.notes) else {}
    yield from _table(("", ""), [
        ("class", f"`{report.architecture}` {where}"),
        ("parameters", f"{num_parameters(config.model_copy(update=dropped)):,}"),
        ("layers x hidden size", _size(config)),
        ("attention heads", f"{config.num_attention_heads:,}"),
        ("inner size", _inner(config)),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("longest sequence", f"{config.max_position_embeddings:,} tokens"),
        ("form", _form(config)),
    ])  # fmt: skip
    if report.notes:
        yield ""
        yield from (f"- {plain(note)}" for note in report.notes)


def _form(config: BertConfig) -> str:
    """What tells this BERT from others, besides sizes."""
    parts = [
        f"LayerNorm {'after' if config.layer_norm == 'post' else 'before'} each block",
        f"{config.position} positions",
        f"activation {config.hidden_act}",
        "tied decoder" if config.tie_word_embeddings else "untied decoder",
    ]
    if config.embedding_scale:
        parts.append("scaled embeddings")
    return plain(", ".join(parts + _small_forms(config)))


def _small_forms(config: BertConfig) -> list[str]:
    found = []
    if config.pooling != "none":
        found.append(f"{config.pooling} pooling of {config.pooling_size} tokens")
    if shared := config.shared_attention_layers:
        found.append(f"attention shared in layers {', '.join(map(str, shared))} (from 0)")
    return found


def _use(report: ExportReport) -> Iterator[str]:
    trust = ", trust_remote_code=True" if report.needs_code else ""
    yield "```python"
    yield "import torch"
    names = "AutoModelForMaskedLM" + (", AutoTokenizer" if report.has_tokenizer else "")
    yield f"from transformers import {names}"
    yield ""
    yield 'folder = "."  # where this file lies'
    yield f"model = AutoModelForMaskedLM.from_pretrained(folder{trust})"
    if report.has_tokenizer:
        yield f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})"
        yield 'text = f"this is the {tokenizer.mask_token} of it ."'
        yield 'batch = tokenizer(text, return_tensors="pt")'
        yield "with torch.no_grad():"
        yield "    logits = model(**batch).logits"
        yield 'masked = batch["input_ids"][0] == tokenizer.mask_token_id'
        yield "print(tokenizer.decode(logits[0, masked].argmax(-1)))"
    else:
        yield "ids = torch.tensor([[1, 2, 1]])  # the run kept no tokenizer"
        yield "with torch.no_grad():"
        yield "    print(model(ids).logits.argmax(-1))"
    yield "```"
    if report.needs_code:
        yield ""
        yield "`trust_remote_code` runs the two Python files in this folder: read them first."


def _training(facts: RunFacts) -> Iterator[str]:
    recipe, state, metrics = facts.recipe, facts.state, facts.metrics
    start = metrics.start if metrics else None
    data, betas = recipe.data, recipe.optimizer.betas
    device = NOT_KNOWN if start is None else f"{plain(start.device)}, ranks: {start.world_size:,}"
    clip = recipe.optimizer.max_grad_norm
    yield from _table(("", ""), [
        ("began from", plain(facts.beginning) + _digest_of_start(start)),
        ("checkpoint", f"{plain(facts.tag)}: step {state.global_step:,} of {recipe.total_steps:,}"),
        ("optimizer", f"{plain(facts.optimizer)}, betas {betas[0]:g} and {betas[1]:g}, eps "
                      f"{recipe.optimizer.eps:g}, weight decay {recipe.optimizer.weight_decay:g}, "
                      + (f"gradients clipped at {clip:g}" if clip else "no clipping")),
        ("learning rate", _rate(recipe.learning_rate)),
        ("batch", f"{recipe.global_batch_size:,} sequences of at most {data.max_seq_length:,} "
                  "tokens"),
        ("masks", f"{data.masking}, {100 * data.masked_lm_prob:g} % of the tokens, at most "
                  f"{data.max_predictions_per_seq:,} a sequence"
                  + (", whole words" if data.whole_word else "")),
        ("tokens seen", f"{state.tokens:,}, padding included"),
        ("precision", plain(start.precision) if start else NOT_KNOWN),
        ("device", device),
        ("seed", recipe.seed),
        ("trained with", _versions(start.versions if start else "")),
        ("exported with", f"torch {torch.__version__}, transformers {transformers.__version__}, "
                          f"progressive-bert-trainer {__version__}"),
    ])  # fmt: skip
    yield ""
    head = ("stage", "steps done", "layers x hidden", "heads", "inner", "sequence", "form",
            "growth on entry", "moments on entry")  # fmt: skip
    yield from _table(head, (_stage(facts, index) for index in range(len(recipe.stages))))


def _digest_of_start(start: RunStart | None) -> str:
    return f", sha256 `{plain(start.start_sha256)}`" if start and start.start_from else ""


def _versions(text: str) -> str:
    """Of run_start: torch, DeepSpeed, this trainer."""
    names = ("torch", "deepspeed", "progressive-bert-trainer")
    found = text.split(", ")
    if len(found) != len(names):
        return NOT_KNOWN
    return plain(", ".join(f"{n} {version}" for n, version in zip(names, found, strict=True)))


def _rate(rate: LearningRateConfig) -> str:
    if rate.schedule == "piecewise":
        return "linear between " + ", ".join(f"{r:g} at step {step:,}" for step, r in rate.points)
    parts = [f"{rate.schedule}, peak {rate.peak:g}", f"warm-up {rate.warmup_steps:,} steps"]
    if rate.schedule == "wsd":
        parts.append(f"decay in the last {rate.decay_steps:,}")
    if rate.schedule != "constant":
        parts.append(f"end {rate.end:g}")
    return ", ".join(parts) + (", anew in each stage" if rate.scope == "stage" else "")


def _stage(facts: RunFacts, index: int) -> tuple[str, ...]:
    recipe, state = facts.recipe, facts.state
    stage, model = recipe.stages[index], recipe.stage_model(index)
    before = sum(earlier.steps for earlier in recipe.stages[:index])
    done = min(max(0, state.global_step - before), stage.steps)
    form = _small_forms(model)
    if stage.freeze:
        form.append(f"{stage.freeze.layers} of {stage.num_hidden_layers} layers frozen")
    if stage.rewarm:
        form.append(f"rate of {stage.rewarm.parameters} parameters times {stage.rewarm.factor:g}")
    return (
        str(index + 1),
        f"{done:,} of {stage.steps:,}" if index <= state.stage else "not reached",
        _size(model),
        f"{model.num_attention_heads:,}",
        _inner(model),
        f"{recipe.stage_data(index).max_seq_length:,}",
        plain(", ".join(form)),
        plain(_growth(recipe, index) if index else facts.beginning),
        plain(stage.moments if index else ""),
    )


def _growth(recipe: Recipe, index: int) -> str:
    try:
        return StageGrowth(recipe, index).name
    except GrowthError:  # another version's, which this one would not do
        return NOT_KNOWN


def _data(facts: RunFacts) -> Iterator[str]:
    said = "not stated" if facts.data_license is None else plain(facts.data_license)
    yield f"Licence of the data: {said}."
    yield ""
    manifest = facts.manifest
    if manifest is None:
        yield "The run folder has no manifest of its data, so their files are not known here."
        return
    statistics, settings = manifest.statistics, manifest.settings
    yield from _table(("", "training", "held out"), [
        ("documents", *(_count(manifest.num_documents.get(s)) for s in ("training", "validation"))),
        ("tokens", *(_count(statistics.get(f"{s}_tokens")) for s in ("training", "validation"))),
        ("sequences", *(_count(sum(e.rows for e in entries))
                        for entries in (manifest.training, manifest.validation))),
    ])  # fmt: skip
    kind = settings.get("tokenizer_kind", "")
    yield ""
    yield f"Tokenizer: {manifest.vocab_size:,} pieces{plain(f', {kind}' if kind else '')}, "
    yield f"sha256 of the vocabulary `{plain(manifest.tokenizer_sha256)}`."
    yield ""
    files = [*_files(settings, "inputs", "training"), *_files(settings, "validation", "held out")]
    if not files:
        files = [(plain(e.file), "shard", plain(e.sha256))
                 for e in (*manifest.training, *manifest.validation)]  # fmt: skip
    yield from _table(("file", "for", "sha256"), files[:_MOST_FILES])
    if len(files) > _MOST_FILES:
        yield ""
        yield f"And {len(files) - _MOST_FILES:,} more, which the run's manifest.json lists."


def _files(settings: dict[str, object], key: str, use: str) -> Iterator[tuple[str, ...]]:
    """Name and sha256 of each input, or its size where it was somebody else's shard."""
    listed = settings.get(key)
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, list) and len(entry) == 2:
            name, proof = entry
            yield plain(name), use, plain(proof if isinstance(proof, str) else f"{proof} bytes")


def _losses(facts: RunFacts) -> Iterator[str]:
    metrics = facts.metrics
    if metrics is None:
        yield "The run's metrics.jsonl is missing or cannot be read, so its losses are not known."
        return
    rows = [("predicting word frequencies (unigrams)", _nats(metrics.start.unigram_loss), "")]
    if found := facts.evaluation:
        accuracy = f"{100 * found.val_mlm_accuracy:.2f} %"
        name = f"held-out masked tokens, step {found.global_step:,}"
        rows.append((name, _nats(found.val_mlm_loss), accuracy))
    yield from _table(("", "loss, nats a token", "accuracy"), rows)
    if found is None:
        yield ""
        yield "This stage was not evaluated up to the exported step."
    switches = [s for s in metrics.switches if s.to_stage <= facts.state.stage]
    if switches:
        yield ""
        yield "Growth, with the loss of one training batch before and after:"
        yield ""
        head = ("step", "to stage", "operators", "loss before", "loss after")
        yield from _table(head, (
            (f"{s.global_step:,}", s.to_stage + 1, plain(s.operator), _nats(s.loss_before),
             _nats(s.loss_after)) for s in switches
        ))  # fmt: skip


def _check(report: ExportReport) -> str:
    return (
        "Before this folder counted, transformers loaded it and computed logits of random ids with "
        "padding in fp32. The largest difference from those of the trainer's own model was "
        f"{report.max_logit_difference:.1e}; allowed is less than {MAX_LOGIT_DIFFERENCE:.0e}."
    )


def _size(config: BertConfig) -> str:
    return f"{config.num_hidden_layers:,} x {config.hidden_size:,}"


def _inner(config: BertConfig) -> str:
    sizes = {config.inner_size(layer) for layer in range(config.num_hidden_layers)}
    return " to ".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)}))


def _nats(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else NOT_KNOWN


def _count(number: object) -> str:
    return f"{number:,.0f}" if isinstance(number, int | float) and number else NOT_KNOWN
