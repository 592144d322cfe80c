"""Score a model with mirrored images too: python score.py MODEL DATASET"""

import sys

from threestage.evaluation import evaluate_model
from threestage.mlflow_sync.records import RegistrySettings
from threestage.prediction.predict import open_model
from threestage.prediction.tta import TTASettings

model, dataset = sys.argv[1:]
network, card = open_model(model, RegistrySettings())
scores = evaluate_model(network, card, dataset, "val", TTASettings(flip=True))
print(f"{scores['protocol']}: mean IoU {scores['mean_iou']:.3f}", scores["per_class_iou"])
