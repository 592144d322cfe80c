"""The stages of a run, on Ray, with MLflow: python train_on_ray.py DATASET RUN [a.b=c …]"""

import sys

from threestage.config import load
from threestage.report.scores import results_table
from threestage.run.backend import RunCallbacks
from threestage.run.run import run as train

dataset, run, *changes = sys.argv[1:]
config = load("own_images", [f"data.root={dataset}", *changes])
print(results_table(train(config, run, local=False, on=RunCallbacks(on_metrics=print))))
