"""`python -m threestage …` is `threestage …`. A submitted job begins here: what it expects of the cluster is checked first."""

import os
import sys

from threestage.cli.app import main, reported
from threestage.plain_text import escape_control_chars
from threestage.ray_backend.job_package import check_environment


def main_on_cluster() -> None:
    with reported():
        check_environment(os.environ, lambda text: print(f"warning: {escape_control_chars(text)}", file=sys.stderr))
    main()


if __name__ == "__main__":
    main_on_cluster()
