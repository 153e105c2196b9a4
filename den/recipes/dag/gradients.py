"""Gradients of tasks that get in each other's way, combined otherwise than by their sum: PCGrad and CAGrad.

Both combine gradients linearly, by coefficients that depend on their scalar products only.  Of K tasks the backward
pass runs K + 1 times.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

Combine = Callable[[Tensor], Tensor]  # products [K, K] of gradients -> coefficients [K]


def combined_backward(
    losses: Tensor,  # [K]
    total: Tensor,  # [], of which everything but the shared parameters gets its gradient
    shared: Sequence[nn.Parameter],
    combine: Combine,
) -> None:
    """Run the backward pass of `total`; the gradients of `shared` are the tasks' own, combined."""
    shared = [parameter for parameter in shared if parameter.requires_grad]
    if not shared or len(losses) < 2:
        total.backward()
        return
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
        parts = (torch.zeros_like(p) if g is None else g for p, g in zip(shared, found, strict=True))
        rows.append(torch.cat([part.flatten() for part in parts]))
    total.backward()
    gradients = torch.stack(rows)
    flat = combine(gradients @ gradients.T) @ gradients
    for parameter, part in zip(shared, flat.split([p.numel() for p in shared]), strict=True):
        parameter.grad = part.view(parameter.shape).clone(memory_format=torch.preserve_format)


def pcgrad(products: Tensor, generator: torch.Generator) -> Tensor:
    """Coefficients [K] of projected gradients (PCGrad: Yu et al., NeurIPS 2020), of products [K, K].

    The gradient of each task loses, for the others in random order, what points against theirs; then all are added up.
    Nothing is read from the device.
    """
    count, products = len(products), products.double()
    rows = []
    for i in range(count):
        row = torch.zeros_like(products[i])
        row[i] = 1
        for j in torch.randperm(count, generator=generator).tolist():
            if j != i:
                against = (row @ products[j]).clamp_max(0)
                row[j] -= against / products[j, j].clamp_min(torch.finfo(torch.float64).tiny)
        rows.append(row)
    return torch.stack(rows).sum(0).float()


def cagrad(products: Tensor, c: float) -> Tensor:
    """Coefficients [K] of the conflict-averse gradient (CAGrad: Liu et al., NeurIPS 2021), of products [K, K].

    Within a ball of radius ``c |g|`` around the mean gradient g it is the one that helps the worst-off task most;
    scaled by ``K / (1 + c^2)``, so that c = 0 gives the sum.  The products are read from the device once.
    """
    gram = products.detach().double().cpu().numpy()
    count = len(gram)
    scale = np.sqrt(max(float(np.trace(gram)) / count, 1e-300))
    gram = gram / scale**2
    mean = np.full(count, 1 / count)
    radius = c * np.sqrt(max(mean @ gram @ mean, 0.0))

    def worst(w: np.ndarray) -> float:
        return float(w @ gram @ mean + radius * np.sqrt(max(w @ gram @ w, 0.0) + 1e-12))

    found = minimize(
        worst, mean, method="SLSQP", bounds=[(0, 1)] * count, constraints={"type": "eq", "fun": lambda w: w.sum() - 1}
    )
    w = found.x if worst(found.x) <= worst(mean) else mean
    length = np.sqrt(max(w @ gram @ w, 0.0))
    coefficients = mean + (radius / length * w if length > 1e-9 else 0)
    return torch.from_numpy(count * coefficients / (1 + c**2)).to(products.device, torch.float32)
