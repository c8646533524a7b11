"""A rank that only adds up and is watched, without end: what a lost host does, without a model."""

import time
from datetime import timedelta

import torch
from torch import distributed

from stacking.rank_watch import RankWatch

if __name__ == "__main__":
    distributed.init_process_group("gloo", timeout=timedelta(minutes=40))
    with RankWatch() as watch:
        print("begun", flush=True)
        step = 0
        while True:
            step += 1
            watch.mark(step, "adding")
            distributed.all_reduce(torch.ones(3))
            time.sleep(0.01)
