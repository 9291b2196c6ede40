"""Numbers in README and docs, written from the rows in the repository: ``make figures``."""
