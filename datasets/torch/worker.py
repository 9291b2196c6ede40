"""A worker that is ready once a small network has learnt a step."""

from __future__ import annotations

import signal

import torch

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
inputs = torch.randn(32, 8)
before = model(inputs).square().mean()
before.backward()
optimizer.step()
assert model(inputs).square().mean() < before
print("READY", flush=True)
signal.sigwait({signal.SIGTERM, signal.SIGINT})
