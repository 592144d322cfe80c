"""The script that MLflow packs into a registered model ("models from code"): images in, class ids out, no pickle.

It is executed when a model is logged and when it is loaded, so torch is imported only once weights are really needed.
"""

from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class PackedModel(PythonModel):  # type: ignore[misc,unused-ignore]
    """Predicts class ids with the network in the artifact folder "model" (model.safetensors and model.json)."""

    def load_context(self, context: Any) -> None:
        import torch

        from threestage.models.export import load_model

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network, card = load_model(context.artifacts["model"])
        self.network = network.to(self.device).eval()
        self.downscale = card.downscale

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """uint8 RGB images (N,H,W,3) → uint8 class ids (N,H,W). One image at a time, whole, at a single scale."""
        return np.stack([self._class_ids(image) for image in model_input])

    def _class_ids(self, image: np.ndarray) -> np.ndarray:
        """(H,W,3) → (H,W). A model trained on images downscaled by k sees the image so, and its answer is enlarged."""
        import torch
        from torch.nn import functional

        height, width = image.shape[:2]
        pixels = torch.from_numpy(np.array(image)).to(self.device).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            if self.downscale > 1:
                pixels = functional.avg_pool2d(pixels, self.downscale, ceil_mode=True)
            logits = self.network(pixels)[0].float()
            if self.downscale > 1:
                logits = functional.interpolate(logits, scale_factor=self.downscale, mode="bilinear")
            class_ids = logits.argmax(dim=1)[0, :height, :width]
        return np.asarray(class_ids.to(torch.uint8).cpu().numpy())


set_model(PackedModel())
