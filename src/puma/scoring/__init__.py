"""Scores of a whole pool in bounded memory, as tables of resumable parts.

`score` measures margins, `snapshots` computes scores and features from a run's snapshots, `labels` finds wrong labels,
`parts` is the folder of a table, `job` names it all by text and estimates its cost.
"""

from puma.scoring.score import score_margins

__all__ = ["score_margins"]
