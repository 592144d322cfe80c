"""`threestage run` with every row and warning as a line of JSON and the time it came, for tests that look on.

python -m tests.faults.driver CONFIG-AS-JSON OUT
"""

import json
import sys
import time
from typing import Any

from threestage.config import Config
from threestage.errors import InputError, StageFailure
from threestage.run.backend import RunCallbacks
from threestage.run.run import run


def say(**values: Any) -> None:
    print(json.dumps({"time": time.time(), **values}), flush=True)


def main() -> None:
    config, out = Config.model_validate_json(sys.argv[1]), sys.argv[2]
    try:
        on = RunCallbacks(lambda stage, row: say(stage=stage, row=dict(row)), lambda text: say(warning=text))
        results = run(config, out, False, on)
    except (InputError, StageFailure) as error:
        say(error=str(error))
        sys.exit(1)
    say(results=results["stages"])


if __name__ == "__main__":
    main()
