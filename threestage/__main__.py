"""`python -m threestage …` is `threestage …`. A submitted job begins here: what it expects of the cluster is checked first."""

import os
import sys

from threestage.cli import main
from threestage.errors import InputError
from threestage.plain_text import one_line, visible
from threestage.submission import check_environment


def begin() -> None:
    try:
        check_environment(os.environ, lambda text: print(f"warning: {visible(text)}", file=sys.stderr))
    except InputError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    main()


if __name__ == "__main__":
    begin()
