"""Hostile use of the operators: what the fuzzer found, its short form, memory, processes."""

from __future__ import annotations

import math

import pytest
import torch
from cases import GRADIENT_OF_EIGH, SINGLE_DRAW, absolute_error, eigh_error, gaussian, generator
from torch import Tensor

from vne_kernels import doe_loss, reference, vn_entropy

# ---------------------------------------------------------------------------------------------
# What the fuzzer found
# ---------------------------------------------------------------------------------------------


def rounded_to_collapse(n: int, d: int, seed: int) -> Tensor:
    """One direction, all of whose noise is about the rounding of bfloat16."""
    g = generator(seed)
    return (gaussian(1, d, g) + 1e-4 * gaussian(n, d, g)).bfloat16().float()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_inverses_do_not_grow_out_of_rounding(normalize: bool, seed: int) -> None:
    """The poles' inverses grew, to 130,000 times the error of eigh."""
    z = rounded_to_collapse(200, 120, seed).requires_grad_()
    vn_entropy(z, normalize=normalize, method="poles").backward()
    leaf = z.detach()
    error = absolute_error(z.grad, reference.oracle_grad(leaf, normalize=normalize))
    allowed = SINGLE_DRAW * GRADIENT_OF_EIGH * eigh_error(leaf, normalize=normalize)
    assert error <= allowed


def gradients_of_the_loss(z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
    views = (z1.clone().requires_grad_(), z2.clone().requires_grad_())
    return torch.autograd.grad(doe_loss(*views).sum(), views)


@pytest.mark.parametrize("magnitude", [2.0**80, 2.0**110])
def test_gradient_of_the_loss_at_huge_rows(magnitude: float) -> None:
    """It vanished with the product of two inverse norms."""
    z1, z2 = (gaussian(6, 9, generator(seed)).float() for seed in (0, 1))
    huge = gradients_of_the_loss(magnitude * z1, magnitude * z2)
    for own, expected in zip(huge, gradients_of_the_loss(z1, z2), strict=True):
        torch.testing.assert_close(magnitude * own, expected, rtol=1e-5, atol=1e-7)


def test_a_norm_beyond_float64_is_no_zero_row() -> None:
    z1, z2 = (gaussian(8, 64, generator(seed)).view(2, 4, 64) for seed in (0, 1))
    z2[0, 0] = 1e308
    loss = doe_loss(z1, z2)
    assert loss.isnan().tolist() == [True, False]
    for own in gradients_of_the_loss(z1, z2):
        assert own[0].isnan().all()
        assert own[1].isfinite().all()


@pytest.mark.parametrize("method", ["eigh", "poles"])
def test_rows_shorter_than_a_normal_number(method: str) -> None:
    """Without eps: neither an exception nor NaN, nor infinities that are not the gradient's."""
    subnormal = torch.full((3, 4), 5e-324, dtype=torch.float64, requires_grad=True)
    entropy = vn_entropy(subnormal, eps=0.0, method=method)
    entropy.backward()
    assert entropy.isfinite()
    assert subnormal.grad.isfinite().all()
    z = (1e-40 * gaussian(6, 9, generator(0))).float().requires_grad_()
    vn_entropy(z, eps=0.0, method=method).backward()
    assert not z.grad.isnan().any()
    exact = reference.oracle_grad(z.detach())
    beyond = exact.abs() > torch.finfo(torch.float32).max
    assert (z.grad[beyond] == math.inf * exact[beyond].sign()).all()


def test_second_derivative_at_zero_rows_without_eps() -> None:
    z = torch.zeros(6, 9, requires_grad=True)
    (grad,) = torch.autograd.grad(vn_entropy(z, eps=0.0), z, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), z)
    assert (second == 0).all()
