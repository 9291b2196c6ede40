"""A root of the original snapshotter, taken over with its snapshots."""
