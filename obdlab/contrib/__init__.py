"""Parts that the core does not need: found through entry points, described in docs/develop/contrib.md."""
