"""Margins of a whole pool, streamed: memory follows the batch, and what is finished is never done again.

`score_margins` is the front door. `settings` says what a table depends on, `stream` turns rows of a pool into rows of
a table, `parts` keeps the folder, `health` looks at the model before the work starts.
"""

from puma.scoring.score import score_margins

__all__ = ["score_margins"]
