"""Scores of a whole pool in bounded memory, as tables of resumable parts.

`score` measures margins, `snapshots` computes scores over a run's snapshots, `labels` finds wrong labels,
`embed` writes feature vectors, `cost` estimates time and memory, `parts` is the folder of a table, `job` names it all.
"""

from puma.scoring.score import score_margins

__all__ = ["score_margins"]
