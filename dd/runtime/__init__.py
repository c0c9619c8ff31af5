"""What knows nothing of distillation: files, caches, checks, devices, processes."""
