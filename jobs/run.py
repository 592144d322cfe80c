"""Entry point for `ray job submit … -- python jobs/run.py PRESET_OR_YAML --out URI`: exactly `threestage run`."""

import sys

from threestage.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["run"]
    main()
