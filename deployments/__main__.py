"""`python -m deployments`: `serve run --name sida deployments.app:build`, on an HTTP address of one's choice.

`serve run` itself always takes port 8000. Ctrl-C or SIGTERM ends it, after the requests that run have ended.
"""

import argparse
import signal
from typing import Any

import click
import ray
from ray import serve

from deployments.app import build

APP = "sida"


def main() -> None:
    arguments = _parser().parse_args()
    try:
        app = build(dict(_pair(text) for text in arguments.settings))
    except click.ClickException as error:
        raise SystemExit(f"Error: {error.message}") from error
    _start_ray(arguments.object_store_gb)
    # After ray.init, whose own handler ends the process without shutting the application down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    try:
        serve.run(app, name=APP, blocking=True)
    except KeyboardInterrupt:
        print("Stopping when the running requests have ended; Ctrl-C again ends them.", flush=True)
    finally:
        _stop()


def _stop() -> None:
    """Let what runs end, within `drain_timeout_s`; `serve.shutdown` alone would close its connections at once."""
    while True:
        try:
            serve.delete(APP)
            break
        except TimeoutError:  # it waits for a minute only
            continue
    serve.shutdown()


def _start_ray(object_store_gb: float | None) -> None:
    """Join a Ray that runs already, or start one; always start one where the size of its object store is given."""
    options: dict[str, Any] = {}
    if object_store_gb is not None:
        options = {"address": "local", "object_store_memory": int(object_store_gb * 1e9)}
    try:
        ray.init(namespace="serve", include_dashboard=False, log_to_driver=True, **options)
    except ValueError as error:  # of the size: more than this machine has, or less than Ray needs
        raise SystemExit(f"Error: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deployments", description="Serve a model on this machine."
    )
    parser.add_argument("--host", default="127.0.0.1", help="HTTP address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="HTTP port to listen on (%(default)s)")
    parser.add_argument(
        "--object-store-gb",
        type=float,
        help="start a Ray whose shared memory has this size, 10^9 bytes; experts may fill 80 %% of it (default: 30 %% of RAM)",
    )
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="keys of the configuration, see README.md"
    )
    return parser


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise SystemExit(f"Error: {text!r} is not of the form key=value")
    return key, value


if __name__ == "__main__":
    main()
