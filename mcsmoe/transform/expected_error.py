"""What a layer will lose, by the statistics that it was reduced with: what ``calibration.layer_errors`` measures afterwards.

    expected_l = sum_t | f'_l(x_t) - f_l(x_t) |^2 / sum_t | s_t |^2

over calibration tokens, f' with every gate as it was: a router that shares its weight out anew among the experts that are left
makes another error, so the two are set side by side.
"""

from __future__ import annotations

from torch import Tensor

from mcsmoe.criteria.quadratic import cost
from mcsmoe.criteria.scores import CriterionInputs, gram
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.transform.budget import energy
from mcsmoe.transform.refit import STREAM, RefitReport


def of_dropping(inputs: CriterionInputs, dropped_E: Tensor, whole: LayerStatistics | None = None) -> float | None:
    """That of leaving experts out; None where nothing of their outputs is known.

    Args:
        inputs: with what each expert gives, or what it gives more than its novice.
        dropped_E: bool.
        whole: statistics of the layer as it was, where ``inputs`` are not.
    """
    if inputs.statistics.outputs is None:
        return None
    return max(0.0, cost(gram(inputs).cpu(), dropped_E.cpu())) / energy(inputs.statistics if whole is None else whole)


def of_refit(report: RefitReport, target: str, statistics: LayerStatistics) -> float | None:
    """That of a refitted layer, by the tokens that were held out; None where there are none.

    None too for a refit towards the stream, whose error is that of all blocks so far, and where a shared expert was solved for,
    whose output is in the error and not in the statistics.
    """
    outputs = statistics.outputs
    if target == STREAM or report.shared is not None or not report.held_before > 0 or outputs is None:
        return None
    held_out = report.held_after if report.kept else report.held_before
    return held_out * float(outputs.layer_square_sum) / energy(statistics)
