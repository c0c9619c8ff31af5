"""What the commands do, for Python: `dd.distil`."""
