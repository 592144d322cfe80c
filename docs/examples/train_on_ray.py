"""The three stages, on Ray, with MLflow: python train_on_ray.py DATASET RUN [a.b=c …]"""

import sys

from threestage import runs
from threestage.config import load
from threestage.report import results_table

dataset, run, *changes = sys.argv[1:]
config = load("own_images", [f"data.root={dataset}", *changes])
print(results_table(runs.run(config, run, local=False, show=print, warn=print)))
