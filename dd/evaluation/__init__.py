"""How good a set is, and what is reported of it; distilled sets on disk."""
