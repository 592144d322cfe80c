"""Score a model with mirrored images too: python score.py MODEL DATASET"""

import sys

from threestage.evaluation import evaluate_model
from threestage.inference import Protocol
from threestage.predict import open_model
from threestage.registry import RegistrySettings

model, dataset = sys.argv[1:]
network, card = open_model(model, RegistrySettings())
scores = evaluate_model(network, card, dataset, "val", Protocol(flip=True))
print(f"{scores['protocol']}: mean IoU {scores['mean_iou']:.3f}", scores["per_class_iou"])
