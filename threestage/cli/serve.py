"""`threestage serve`: a model behind HTTP."""

from typing import Annotated

import typer

from threestage.cli.options import (
    AddressOption,
    GpusOption,
    JsonOption,
    StartTimeoutOption,
    TrackingOption,
    WithoutRayOption,
    cluster_of,
    console,
    escape,
    print_json,
    warn,
)


def serve(
    model: Annotated[
        str, typer.Argument(help="NAME@champion, models:/NAME/3, or the folder of a run, a stage or a model")
    ],
    host: Annotated[
        str, typer.Option(help="address to listen at; any but this machine's own needs a token")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen at; 0 takes a free one")] = 8000,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="accept requests of all programs of this machine")
    ] = False,
    max_requests: Annotated[
        int, typer.Option(min=1, help="maximum number of open requests; more are answered with 429")
    ] = 32,
    max_mb: Annotated[
        float, typer.Option(min=0.001, help="maximum size of an image file in MB; larger ones are answered with 413")
    ] = 32,
    local: WithoutRayOption = False,
    address: AddressOption = None,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="processes that predict, with one CPU each")] = 1,
    gpus_per_worker: GpusOption = None,
    start_timeout_s: StartTimeoutOption = 300,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer images over HTTP with masks, figures or overlays, until SIGTERM. New versions of an alias are loaded.

    Example: threestage serve camvid@champion --local
    """
    from threestage.config import validated
    from threestage.mlflow_sync.records import RegistrySettings
    from threestage.serving.settings import ServeSettings, require_serve_extra

    require_serve_extra(on_ray=not local)
    from threestage.serving.followed_model import model_uri
    from threestage.serving.web_server import serve_here, token_for

    most_bytes = int(max_mb * 2**20)
    settings = validated(
        ServeSettings, {"host": host, "port": port, "most_requests": max_requests, "most_bytes": most_bytes}
    )
    token, is_new = token_for(settings, no_token)
    model, registry = model_uri(model), RegistrySettings(tracking_uri=tracking_uri)

    def started(url: str) -> None:
        _show_started(model, url, token if is_new else None, as_json)

    if local:
        serve_here(model, registry, settings, token, started, warn)
    else:
        from threestage.ray_backend.replicas import serve_on_ray

        cluster = cluster_of(address, replicas, gpus_per_worker, start_timeout_s)
        serve_on_ray(model, registry, settings, token, cluster, started, warn)


def _show_started(model: str, url: str, new_token: str | None, as_json: bool) -> None:
    """With the token where it was made here: it is shown this once."""
    if as_json:
        print_json({"model": model, "url": url, "token": new_token})
        return
    lines = [f"{model}: {url}/predict takes images; SIGTERM or Ctrl-C ends it"]
    if new_token is not None:
        lines += [f"token: {new_token}", f"page: {url}/#token={new_token}"]
    for line in lines:
        console.print(escape(line), highlight=False, soft_wrap=True)
