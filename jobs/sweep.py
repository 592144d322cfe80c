"""Entry point for `ray job submit … -- python jobs/sweep.py SPACE PRESET_OR_YAML --out URI`: exactly `threestage sweep`."""

import sys

from threestage.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["sweep"]
    main()
