"""What a new MLflow and a new object store lack: the account that runs log with, and the bucket.

    python prepare.py user            # NEW_USERNAME and NEW_PASSWORD, with MLFLOW_TRACKING_* of the administrator
    python prepare.py bucket NAME     # with the usual AWS variables

Doing it again is fine: the account gets the password anew, the bucket stays. Fails while the server does not answer.
"""

import os
import sys


def make_user(username: str, password: str) -> str:
    from mlflow.exceptions import RestException
    from mlflow.server import get_app_client

    client = get_app_client("basic-auth", tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    try:
        client.create_user(username, password)
    except RestException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_user_password(username, password)
        return f"{username}: password set"
    return f"{username}: made"


def make_bucket(name: str) -> str:
    import boto3

    s3 = boto3.client("s3")
    if any(bucket["Name"] == name for bucket in s3.list_buckets()["Buckets"]):
        return f"{name}: is there"
    s3.create_bucket(Bucket=name)
    return f"{name}: made"


def main() -> None:
    match sys.argv[1:]:
        case ["user"]:
            print(make_user(os.environ["NEW_USERNAME"], os.environ["NEW_PASSWORD"]))
        case ["bucket", name]:
            print(make_bucket(name))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
