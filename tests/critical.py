"""A critical point at any network: a loss whose gradient is 0 there, though the gradient at the outputs is not.

With J the Jacobian of the outputs on N inputs with respect to the parameters, and more outputs than parameters,
there are r with J' r = 0 that are not 0; the loss sum(r * outputs) is critical.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap


class Problem:
    """Inputs (N, ...) and the weights r of all their outputs, of length 1, at which `model` is critical."""

    def __init__(self, model: nn.Module, example: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        parameters = {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}
        count = sum(tensor.numel() for tensor in parameters.values())
        with torch.no_grad():
            outputs = model(example[:1]).numel()
        samples = int(1.1 * count / outputs) + 5
        self.inputs = torch.randn(samples, *example.shape[1:], generator=generator, dtype=torch.float64)
        one = jacrev(lambda p, x: functional_call(model, p, (x.unsqueeze(0),)).reshape(-1))
        jacobian = vmap(one, in_dims=(None, 0))(parameters, self.inputs)
        matrix = torch.cat([part.reshape(samples * outputs, -1) for part in jacobian.values()], 1)
        basis, sizes, _ = torch.linalg.svd(matrix, full_matrices=False)
        basis = basis[:, sizes > 1e-13 * sizes[0]]
        r = torch.randn(len(matrix), generator=generator, dtype=torch.float64)
        for _ in range(3):
            r = r - basis @ (basis.T @ r)
        self.weights = r / r.norm()

    def gradient(self, model: nn.Module) -> float:
        """The norm of the loss's gradient with respect to all trained parameters of `model`."""
        loss = (model(self.inputs).reshape(-1) * self.weights).sum()
        found = torch.autograd.grad(
            loss, [parameter for parameter in model.parameters() if parameter.requires_grad]
        )
        return float(torch.cat([part.reshape(-1) for part in found]).norm())
