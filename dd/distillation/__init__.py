"""The outer loop: its settings, its state, and what one watches."""
