"""A run of this process into MLflow, and its best model out of it: python register_and_pull.py RUN TRACKING_URI FOLDER"""

import sys

from threestage.mlflow_sync.client import open_models
from threestage.mlflow_sync.records import RegistrySettings
from threestage.mlflow_sync.run_sync import sync

run, tracking_uri, folder = sys.argv[1:]
versions = sync(run, tracking_uri)
for version in versions:
    print(version.name, version.version, version.alias)
models = open_models(RegistrySettings(tracking_uri=tracking_uri))
print(models.pull(f"models:/{versions[0].name}@champion", folder))
