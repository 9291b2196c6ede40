"""Whole ways through real programs: registry, containerd, its clients, runc, the kernel."""
