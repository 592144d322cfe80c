"""Masks, overlays and confidences of a folder of images: python predict_folder.py MODEL IMAGES OUT"""

import sys

from threestage.mlflow_sync.records import RegistrySettings
from threestage.prediction.predict import PredictSettings, predict_input, read_model

model, images, out = sys.argv[1:]
report = predict_input(read_model(model, RegistrySettings()), images, out, PredictSettings(confidence=True))
print(f"{report.images} images predicted, {report.bad} left out")
