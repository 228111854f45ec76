"""Scores of a whole pool in bounded memory, as tables of resumable parts."""

from puma.scoring.score import score_margins as score_margins
