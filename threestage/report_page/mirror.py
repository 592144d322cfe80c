"""The page as an artifact of the run in MLflow, where the run has one."""

import os

from threestage.data import storage
from threestage.errors import InputError, reason_of
from threestage.mirror import RUN_NAME, registry_of
from threestage.registry import open_registry
from threestage.report_page.figures import CONFIG_NAME, PAGE_NAME
from threestage.run_files import RunSettings
from threestage.tracking import redact, resolve_uri, sqlite_path


def log_page(run: str, page: str, finished: bool, tracking_uri: str | None = None) -> str | None:
    """Log the page at the URI `page` to the run's parent run. Returns why that was not done, or None; a run that never was in
    MLflow has nothing to tell."""
    identity = storage.join(storage.absolute(run), RUN_NAME)
    if not storage.exists(identity):
        return None
    if not finished:
        return "the page is not logged to MLflow: the run is not finished, its end will do that"
    config = storage.join(storage.absolute(run), CONFIG_NAME)
    settings = registry_of(
        storage.read_json(config, RunSettings) if storage.exists(config) else {}, tracking_uri, config
    )
    store = sqlite_path(resolve_uri(settings.tracking_uri))
    if store is not None and not os.path.exists(store):
        return f"the page is not logged to MLflow: there is no store {store}; name the run's with --tracking-uri"
    try:
        key = str(storage.read_value(identity, "run_key", str))
        open_registry(settings).close_run(key, "FINISHED", {}, {PAGE_NAME: page})
    except (InputError, OSError) as error:
        return f"the page is not logged to MLflow: {redact(reason_of(error))}"
    return None
