"""The section [tracking] of release.toml."""

from __future__ import annotations

import pydantic

from cfsp.validation import Section


class TrackingConfig(Section):
    """Where releases are logged; the section's presence turns it on.

    Attributes:
        mlflow: MLflow's tracking URI: `sqlite:///FILE.db`, `http://HOST:PORT`.
        experiment: Name of the experiment; made when missing.
        files: Log the exported files too, not only records and reports.
    """

    mlflow: str = pydantic.Field(min_length=1)
    experiment: str = pydantic.Field(default="phoneready", min_length=1)
    files: bool = False
