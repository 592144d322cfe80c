"""threestage: three-stage self-training for semi-supervised semantic segmentation (arXiv 2012.00827)."""

__version__ = "0.1.0"

IGNORE_INDEX = 255
