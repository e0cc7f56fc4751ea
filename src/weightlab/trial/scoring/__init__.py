"""Scoring a training set from the command line: where the examples come from, retraining without some, the page."""
