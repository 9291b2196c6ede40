"""The original's commands under their own names, with its options, output and exit status.

``obdlab install-tools`` puts them into a directory. Each is an argument translator over obdlab's own functions.
"""
