"""Routing statistics as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcsmoe.artefacts.tables import frame_of
from mcsmoe.statistics.routing import RoutingStatistics

if TYPE_CHECKING:
    import pandas as pd


def routing_frame(statistics: RoutingStatistics) -> pd.DataFrame:
    """Table ``routing``."""
    rows = [
        {
            "layer": layer,
            "expert": expert,
            "tokens": int(found.computed_E[expert]),
            "frequency": float(found.frequency_E[expert]),
            "router_probability": float(found.probability_E[expert]),
            "dropped": int(found.dropped_E[expert]),
        }
        for layer, found in statistics.layers.items()
        for expert in range(len(found.computed_E))
    ]
    return frame_of(rows, "routing")
