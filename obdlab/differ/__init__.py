"""containerd's differ for block layers: places or makes them at unpacking, and makes them of containers."""
