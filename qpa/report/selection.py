"""What a selection says of the ways to run a circuit, as rows for a table and as JSON."""

from __future__ import annotations

from typing import Any

from qpa.documents import Selection, Strategy
from qpa.report.rows import Rows, number

SELECTION_HEADER = ("level", "layouts", "mitigation", "shots", "error", "executions", "time")


def selection_title(selection: Selection) -> str:
    """Return the title of the table of candidates."""
    n_candidates = len(selection.candidates)
    shown = f"{sum(one.is_non_dominated for one in selection.candidates)} of {n_candidates} candidates"
    return f"a step's forward pass on {selection.target}, by its simulated noise: {shown} that none beats"


def selection_rows(selection: Selection) -> Rows:
    """Return the non-dominated candidates under the words of `SELECTION_HEADER`, fewest executions first."""
    best = [one for one in selection.candidates if one.is_non_dominated]
    return [_row(selection, one) for one in sorted(best, key=_order)]


def selection_json(selection: Selection) -> dict[str, Any]:
    """Return the chosen candidate, the non-dominated ones, why, and the digest of the document with all."""
    return {
        "digest": selection.digest,
        "target": selection.target,
        "n_candidates": len(selection.candidates),
        "chosen": _facts(selection, selection.chosen_strategy),
        "why": selection.why,
        "non_dominated": [
            _facts(selection, one) for one in sorted(selection.candidates, key=_order) if one.is_non_dominated
        ],
    }


def _order(strategy: Strategy) -> tuple[int, float, float]:
    return strategy.n_executions, strategy.time_s, strategy.error


def _row(selection: Selection, strategy: Strategy) -> tuple[str, ...]:
    circuit = selection.circuits[strategy.circuit]
    mark = "*" if strategy is selection.chosen_strategy else " "
    return (
        f"{mark} {circuit.optimization_level}",
        number(circuit.layouts),
        strategy.mitigation,
        number(strategy.shots),
        f"{strategy.error:.4f}",
        number(strategy.n_executions),
        f"{strategy.time_s:,.1f} s",
    )


def _facts(selection: Selection, strategy: Strategy) -> dict[str, Any]:
    circuit = selection.circuits[strategy.circuit]
    return {
        "optimization_level": circuit.optimization_level,
        "layouts": circuit.layouts,
        **strategy.model_dump(include={"mitigation", "shots", "error", "n_executions", "time_s"}),
    }
