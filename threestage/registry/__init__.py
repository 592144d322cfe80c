"""MLflow: runs, metrics, model versions, lineage and pulling. The only package that imports mlflow.

records.py       the settings, and what is recorded
store.py         connecting; a run's stages and a sweep's trials as runs of MLflow
models.py        registered versions: listing, pulling, aliases, champion, lineage
packing.py       a model as MLflow keeps it; packed_model.py travels in it, card.py writes its README

The run's storage is the record; the tracking store is a mirror that can be filled again. So every call here finds what
an earlier one left, completes it and repeats nothing, and an unreachable store is an InputError within seconds.
"""

from threestage.registry.records import (
    RegisteredVersion,
    RegistrySettings,
    StageRecord,
    StageRows,
    Status,
    TrialRecord,
    TrialStatus,
)
from threestage.registry.store import Registry, open_models, open_registry

__all__ = [
    "RegisteredVersion",
    "Registry",
    "RegistrySettings",
    "StageRecord",
    "StageRows",
    "Status",
    "TrialRecord",
    "TrialStatus",
    "open_models",
    "open_registry",
]
