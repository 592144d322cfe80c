"""`python -m threestage …` is `threestage …`. A submitted job begins here: what it expects of the cluster is checked first."""

import os
import sys

from threestage.cli import main, reported
from threestage.plain_text import visible
from threestage.submission import check_environment


def begin() -> None:
    with reported():
        check_environment(os.environ, lambda text: print(f"warning: {visible(text)}", file=sys.stderr))
    main()


if __name__ == "__main__":
    begin()
