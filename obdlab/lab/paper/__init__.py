"""The paper's evaluation on your own machine: questions, the experiments for each, claims and their verdicts."""
