"""Distilled sets that come and go: found by name, loaded, and written in the forms of others."""
