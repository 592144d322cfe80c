"""Entry point for `ray job submit … -- python jobs/predict.py MODEL IMAGES OUT`: exactly `threestage predict`."""

import sys

from threestage.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["predict"]
    main()
