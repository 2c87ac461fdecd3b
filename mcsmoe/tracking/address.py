"""Where runs are published to, without the library that publishes them: also what the workflow compares between runs."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

DATABASE = "mlflow.db"
VARIABLE = "MLFLOW_TRACKING_URI"
EMBEDDED = "embedded"


def embedded_uri(results: str | Path) -> str:
    """URI of the SQLite store in a results folder."""
    return f"sqlite:///{Path(results).resolve() / DATABASE}"


def store_of(results: str | Path, store_uri: str | None = None) -> str:
    """The store to publish to: the one given, else ``MLFLOW_TRACKING_URI``, else the embedded one of ``results``."""
    return store_uri or os.environ.get(VARIABLE) or embedded_uri(results)


def without_credentials(uri: str) -> str:
    """``uri`` without user, password and query, so that it can be shown and kept.

    Raises:
        ValueError: not a URI; names the environment variable.
    """
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        # The text itself may hold a password.
        raise ValueError(f"{VARIABLE} is not an address ({error}); correct it, or unset it") from error
    if "://" not in uri:
        return uri  # a path, or a word such as databricks
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def store_name(results: str | Path) -> str:
    """The store of ``results`` as it is told apart from others: the same wherever the folder lies.

    Raises:
        ValueError: ``MLFLOW_TRACKING_URI`` is not a URI.
    """
    uri = store_of(results)
    return EMBEDDED if uri == embedded_uri(results) else without_credentials(uri)
