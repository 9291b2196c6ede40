"""The paper's evaluation on one's own machine: questions, what is measured for each, claims and their verdicts."""
