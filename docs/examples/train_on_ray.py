"""The three stages, on Ray, with MLflow: python train_on_ray.py DATASET RUN [a.b=c …]"""

import sys

from threestage.config import load
from threestage.report.terminal_tables import results_table
from threestage.run import run as runs

dataset, run, *changes = sys.argv[1:]
config = load("own_images", [f"data.root={dataset}", *changes])
print(results_table(runs.run(config, run, local=False, show=print, warn=print)))
