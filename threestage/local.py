"""`python -m threestage.local PRESET_OR_YAML --out FOLDER`: the pipeline in one process, without Ray and MLflow."""

import torch

from threestage.data.parallel import end_process
from threestage.run.local_main import main

if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    end_process(main())
