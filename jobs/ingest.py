"""Entry point for `ray job submit … -- python jobs/ingest.py SOURCE OUT`: exactly `threestage ingest`."""

import sys

from threestage.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["ingest"]
    main()
