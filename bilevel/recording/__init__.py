"""The inner run: its steps, how it is recorded, and the gradient that gathers over it."""
