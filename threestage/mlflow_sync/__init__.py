"""MLflow: runs, metrics, model versions, lineage and pulling. The only package that imports mlflow.

connection.py       the address, quiet calls that fail fast, text fit to be logged
client.py           a run's stages and a sweep's trials as runs of MLflow
records.py          the settings, and what is recorded
model_registry.py   registered versions: listing, pulling, aliases, lineage
promotion.py        the champion: who earns the alias, a person's approval, the way back
packing.py          a model as MLflow keeps it; packed_model.py travels in it, model_card.md.j2 is its README
run_sync.py         sends what a run's folder holds; sweep_sync.py a sweep's

The run's storage is the record; MLflow is a copy that can be filled again. So every call here finds what an earlier one
left, completes it and repeats nothing. An unreachable server is an InputError within seconds.
"""
