"""Searching for good gin parameters with Optuna: the space, the study, a trial, what was found."""
