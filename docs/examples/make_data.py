"""Synthetic scenes as a data set, to try the other examples on: python make_data.py DATASET"""

import sys

from threestage.data.ingest import IngestSettings, ingest
from threestage.data.synthetic import write_scenes

dataset = sys.argv[1]
write_scenes(f"{dataset}-files", {"train": 40, "val": 6, "test": 4}, seed=0)
settings = IngestSettings(format="camvid", class_map=f"{dataset}-files/class_map.yaml")
print(ingest(f"{dataset}-files", dataset, settings).manifest.counts)
