"""Entry point for `ray job submit … -- python jobs/evaluate.py MODEL DATASET`: exactly `threestage evaluate`."""

import sys

from threestage.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["evaluate"]
    main()
