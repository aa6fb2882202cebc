"""Scenes that hold more than hands do."""
import torch


def soup(seed, faces=40, size=24, batch=2, depth=0.6):
    "Random triangles, intersecting and overlapping, some of them out of the picture; from a depth of 2 on also behind the camera."
    g = torch.Generator().manual_seed(seed)
    centre = (torch.rand(batch, faces, 1, 3, generator=g) - 0.5) * torch.tensor([0.8, 0.8, depth]) + torch.tensor([0, 0, 1.0])
    vertices = (centre + 0.25 * (torch.rand(batch, faces, 3, 3, generator=g) - 0.5)).flatten(1, 2).double()
    K = torch.tensor([[1.2 * size, 0.3, size / 2], [0, 1.3 * size, size / 2 + 1], [0, 0, 1]]).double().repeat(batch, 1, 1)
    return vertices, torch.arange(3 * faces).view(-1, 3), K, (size, size + 5)
