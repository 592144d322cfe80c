"""What runs on the cluster for `threestage check --address`: it prints each result as a line of JSON."""

import json
import sys
from pathlib import Path

from threestage.checks.result import CheckResult, run_check
from threestage.errors import CodedError, reason_of
from threestage.ray_backend.job_check import CODE, MARK, JobSpecification, _code


def main(file: str) -> None:
    from threestage.checks.run_check import check

    found = JobSpecification.model_validate_json(Path(file).read_text())
    say(run_check("versions", "", lambda: _code(found.versions)))
    try:
        for line in check(found.config, found.out, local=False):
            say(line)
    except Exception as error:
        code = error.code if isinstance(error, CodedError) else CODE
        say(CheckResult("the job", "", problem=reason_of(error), code=code))


def say(line: CheckResult) -> None:
    print(MARK + json.dumps(line.as_json()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
