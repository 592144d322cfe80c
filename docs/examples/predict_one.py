"""One image, in memory: python predict_one.py MODEL IMAGE MASK.png"""

import sys
from pathlib import Path

import torch

from threestage.data.palette import palette_png
from threestage.data.records import decode_image, downscale_image
from threestage.mlflow_sync.records import RegistrySettings
from threestage.prediction.predict import open_model
from threestage.prediction.pseudo_masks import predict

model, image, mask = sys.argv[1:]
network, card = open_model(model, RegistrySettings())
pixels = torch.from_numpy(downscale_image(decode_image(Path(image).read_bytes()), card.downscale))
class_ids, confidence, _ = predict(network.eval(), pixels.permute(2, 0, 1)[None])
Path(mask).write_bytes(palette_png(class_ids[0].numpy(), card.colours))
print({name: int((class_ids == i).sum()) for i, name in enumerate(card.classes)}, f"{confidence.mean():.3f} sure")
