"""Every public differentiable function under torch.func and in forward mode.

Each is held to its formula in plain torch, under the same transform. The table of the README is
made of the results: ``python python_tests/test_transforms.py`` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import gaussian, generator
from torch import Tensor
from torch.autograd import forward_ad, gradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import vne_kernels as vne
from vne_kernels.metrics import EffectiveRank

Function = Callable[[Tensor], Tensor]


# ---------------------------------------------------------------------------------------------
# The functions, of one tensor x, and their formulas
# ---------------------------------------------------------------------------------------------


class Case(NamedTuple):
    name: str
    """As in the table of the README."""
    function: Function
    formula: Function
    argument: Callable[[], Tensor]
    order: int
    """How many times it is differentiable; more is refused."""


def rows(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def eigenvalues_of_rows(x: Tensor, p: Tensor | None = None, *, normalize: bool = True) -> Tensor:
    u = rows(x) if normalize else x
    p = x.new_full(x.shape[:-1], 1 / x.shape[-2]) if p is None else p / p.sum(-1, keepdim=True)
    smaller = u.shape[-2] <= u.shape[-1]
    u = p.sqrt().unsqueeze(-1) * u
    return torch.linalg.eigvalsh(u @ u.mT if smaller else u.mT @ u)


def entropy_of(eigenvalues: Tensor) -> Tensor:
    positive = torch.where(eigenvalues > 0, eigenvalues, 1)
    return -(positive * positive.log()).sum(-1)


def renyi_of(eigenvalues: Tensor, order: float) -> Tensor:
    p = eigenvalues.clamp_min(0)
    p = p / p.sum(-1, keepdim=True)
    if order == 1:
        return entropy_of(p)
    return torch.where(p > 0, p, 1).pow(order).mul(p > 0).sum(-1).log() / (1 - order)


def tsallis_of(eigenvalues: Tensor, order: float) -> Tensor:
    if order == 1:
        return renyi_of(eigenvalues, 1)
    return ((1 - order) * renyi_of(eigenvalues, order)).exp().sub(1) / (1 - order)


def rankme_of(x: Tensor) -> Tensor:
    singular = eigenvalues_of_rows(x, normalize=False).sqrt()
    p = singular / singular.sum(-1, keepdim=True) + 1e-7
    return entropy_of(p).exp()


def doe_of(x: Tensor) -> Tensor:
    cosine = torch.nn.functional.cosine_similarity(x[0], x[1], dim=-1).mean(-1)
    return -entropy_of(eigenvalues_of_rows(x[0])) - 2 * cosine


def split_weights(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and weights of one tensor."""
    return x[..., 1:], x[..., 0].square() + 0.1


def density(x: Tensor) -> Tensor:
    """A real density matrix of full rank."""
    rho = x @ x.mT + 0.1 * torch.eye(x.shape[-2], dtype=x.dtype)
    return rho / rho.diagonal().sum()


def hermitian(x: Tensor) -> Tensor:
    """A complex one, of x (2, d, d)."""
    z = torch.complex(x[0], x[1])
    rho = z @ z.mH + 0.1 * torch.eye(x.shape[-1], dtype=z.dtype)
    return rho / rho.diagonal().sum().real


BASIS = torch.linalg.qr(gaussian(4, 4, generator(8))).Q
INDEFINITE = BASIS @ torch.tensor([0.6, 0.4, 0.2, -0.2]).double().diag() @ BASIS.mT


def indefinite(x: Tensor) -> Tensor:
    """Symmetric, with a negative eigenvalue and a positive trace."""
    return INDEFINITE + 0.02 * (x + x.mT)


def entropy_of_matrix(rho: Tensor) -> Tensor:
    return entropy_of(torch.linalg.eigvalsh(rho))


def parts(rho: Tensor) -> tuple[Tensor, Tensor]:
    apart = rho.reshape(2, 2, 2, 2)
    return apart.diagonal(dim1=1, dim2=3).sum(-1), apart.diagonal(dim1=0, dim2=2).sum(-1)


def relative_of(rho: Tensor, sigma: Tensor) -> Tensor:
    mu, w = torch.linalg.eigh(sigma)
    log_sigma = (w * mu.log().unsqueeze(-2)) @ w.mH
    return -entropy_of_matrix(rho) - (rho * log_sigma.mT).sum().real


def wide() -> Tensor:
    return gaussian(4, 6, generator(1))


def tall() -> Tensor:
    return gaussian(6, 4, generator(2))


def square() -> Tensor:
    return gaussian(4, 4, generator(3))


def two(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: torch.stack([make(), make().flip(0)])


CASES = [
    Case("vn_entropy", vne.vn_entropy, lambda x: entropy_of(eigenvalues_of_rows(x)), wide, 2),
    Case(
        "vn_entropy, n > d", vne.vn_entropy, lambda x: entropy_of(eigenvalues_of_rows(x)), tall, 2
    ),
    Case(
        "vn_entropy, poles",
        lambda x: vne.vn_entropy(x, method="poles"),
        lambda x: entropy_of(eigenvalues_of_rows(x)),
        wide,
        2,
    ),
    Case(
        "vn_entropy, weights",
        lambda x: vne.vn_entropy(split_weights(x)[0], weights=split_weights(x)[1]),
        lambda x: entropy_of(eigenvalues_of_rows(*split_weights(x))),
        wide,
        2,
    ),
    Case(
        "vn_entropy, normalize=False",
        lambda x: vne.vn_entropy(x, normalize=False),
        lambda x: entropy_of(eigenvalues_of_rows(x, normalize=False)),
        wide,
        2,
    ),
    Case(
        "vn_entropy, base 2",
        lambda x: vne.vn_entropy(x, base=2),
        lambda x: entropy_of(eigenvalues_of_rows(x)) / torch.tensor(2.0).double().log(),
        wide,
        2,
    ),
    Case("get_vne", vne.get_vne, lambda x: entropy_of(eigenvalues_of_rows(x)), tall, 2),
    Case("VNEntropy", vne.VNEntropy(), lambda x: entropy_of(eigenvalues_of_rows(x)), tall, 2),
    Case("doe_loss", lambda x: vne.doe_loss(x[0], x[1], beta=2), doe_of, two(wide), 2),
    Case("DoELoss", lambda x: vne.DoELoss(beta=2)(x[0], x[1]), doe_of, two(tall), 2),
    Case("spectrum", vne.spectrum, lambda x: eigenvalues_of_rows(x).flip(-1), wide, 1),
    Case(
        "effective_rank",
        vne.effective_rank,
        lambda x: entropy_of(eigenvalues_of_rows(x)).exp(),
        tall,
        2,
    ),
    *(
        Case(
            f"renyi_entropy, order {order}",
            lambda x, order=order: vne.renyi_entropy(x, order),
            lambda x, order=order: renyi_of(eigenvalues_of_rows(x), order),
            wide,
            2 if order == 1 else 1,
        )
        for order in (0.5, 1, 2, 3)
    ),
    *(
        Case(
            f"tsallis_entropy, order {order}",
            lambda x, order=order: vne.tsallis_entropy(x, order),
            lambda x, order=order: tsallis_of(eigenvalues_of_rows(x), order),
            tall,
            2 if order == 1 else 1,
        )
        for order in (1, 2, 3)
    ),
    Case(
        "vendi_score", vne.vendi_score, lambda x: entropy_of(eigenvalues_of_rows(x)).exp(), wide, 2
    ),
    Case(
        "vendi_score, weights",
        lambda x: vne.vendi_score(split_weights(x)[0], 3, weights=split_weights(x)[1]),
        lambda x: renyi_of(eigenvalues_of_rows(*split_weights(x)), 3).exp(),
        wide,
        1,
    ),
    Case(
        "vendi_score of a kernel",
        lambda x: vne.vendi_score(density(x), is_kernel=True, normalize=False),
        lambda x: entropy_of_matrix(density(x)).exp(),
        square,
        1,
    ),
    Case(
        "participation_ratio",
        vne.participation_ratio,
        lambda x: renyi_of(eigenvalues_of_rows(x), 2).exp(),
        wide,
        1,
    ),
    Case("rankme", vne.rankme, rankme_of, wide, 1),
    Case(
        "vn_entropy_from_density",
        lambda x: vne.vn_entropy_from_density(density(x)),
        lambda x: entropy_of_matrix(density(x)),
        square,
        1,
    ),
    Case(
        "vn_entropy_from_density, complex",
        lambda x: vne.vn_entropy_from_density(hermitian(x)),
        lambda x: entropy_of_matrix(hermitian(x)),
        two(square),
        1,
    ),
    Case(
        "vn_entropy_from_density, indefinite",
        lambda x: vne.vn_entropy_from_density(indefinite(x)),
        lambda x: entropy_of_matrix(indefinite(x)),
        square,
        1,
    ),
    *(
        Case(
            f"renyi_entropy_from_density, order {order}",
            lambda x, order=order: vne.renyi_entropy_from_density(density(x), order),
            lambda x, order=order: renyi_of(torch.linalg.eigvalsh(density(x)), order),
            square,
            1,
        )
        for order in (2, 3)
    ),
    Case(
        "tsallis_entropy_from_density",
        lambda x: vne.tsallis_entropy_from_density(density(x), 3),
        lambda x: tsallis_of(torch.linalg.eigvalsh(density(x)), 3),
        square,
        1,
    ),
    Case(
        "partial_trace",
        lambda x: vne.partial_trace(density(x), (2, 2), 0),
        lambda x: parts(density(x))[0],
        square,
        3,
    ),
    Case(
        "conditional_entropy",
        lambda x: vne.conditional_entropy(density(x), (2, 2)),
        lambda x: entropy_of_matrix(density(x)) - entropy_of_matrix(parts(density(x))[1]),
        square,
        1,
    ),
    Case(
        "mutual_information",
        lambda x: vne.mutual_information(density(x), (2, 2)),
        lambda x: (
            sum(entropy_of_matrix(part) for part in parts(density(x)))
            - entropy_of_matrix(density(x))
        ),
        square,
        1,
    ),
    Case(
        "relative_entropy",
        lambda x: vne.relative_entropy(density(x[0]), density(x[1])),
        lambda x: relative_of(density(x[0]), density(x[1])),
        two(square),
        1,
    ),
]


# ---------------------------------------------------------------------------------------------
# The transforms: of a function and its argument, to a tensor
# ---------------------------------------------------------------------------------------------


def summed(f: Function) -> Function:
    """A number, for what is a gradient of one."""
    return lambda x: f(x).square().sum() if f(x).dim() else f(x)


DIRECTION = gaussian(48, 1, generator(5)).flatten()  # nothing is drawn within vmap


def direction(x: Tensor) -> Tensor:
    return DIRECTION[: x.numel()].reshape(x.shape)


def batch(x: Tensor) -> Tensor:
    return torch.stack([x, x + 0.1 * direction(x)])


def by_vjp(f: Function, x: Tensor) -> Tensor:
    value, pull_back = vjp(f, x)
    return pull_back(torch.ones_like(value))[0]


def by_jvp(f: Function, x: Tensor) -> Tensor:
    return jvp(f, (x,), (direction(x),))[1]


def by_forward_ad(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, direction(x)))).tangent


def by_gradcheck(f: Function, x: Tensor) -> Tensor:
    options = {"check_forward_ad": True, "check_batched_grad": True}
    return torch.tensor(gradcheck(f, x.clone().requires_grad_(), **options))


def forward_over_reverse_ad(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), direction(x))
        (gradient,) = torch.autograd.grad(summed(f)(dual), dual, create_graph=True)
        return forward_ad.unpack_dual(gradient).tangent.detach()


FIRST: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "grad": lambda f, x: grad(summed(f))(x),
    "vjp": by_vjp,
    "jvp": by_jvp,
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "vmap of grad": lambda f, x: vmap(grad(summed(f)))(batch(x)),
    "vmap of jvp": lambda f, x: vmap(lambda x: by_jvp(f, x))(batch(x)),
    "forward_ad": by_forward_ad,
    "gradcheck": by_gradcheck,
}
SECOND: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "hessian": lambda f, x: hessian(summed(f))(x),
    "jacrev of jacfwd": lambda f, x: jacrev(jacfwd(summed(f)))(x),
    "jacrev of jacrev": lambda f, x: jacrev(jacrev(summed(f)))(x),
    "jacfwd of jacfwd": lambda f, x: jacfwd(jacfwd(summed(f)))(x),
    "jvp of jvp": lambda f, x: by_jvp(lambda x: by_jvp(f, x), x),
    "vmap of hessian": lambda f, x: vmap(hessian(summed(f)))(batch(x)),
    "forward_ad of grad": forward_over_reverse_ad,
}
THIRD: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "jacrev of hessian": lambda f, x: jacrev(hessian(summed(f)))(x),
    "jacfwd of hessian": lambda f, x: jacfwd(hessian(summed(f)))(x),
}
TRANSFORMS = FIRST | SECOND | THIRD


def typed(case: Case) -> str:
    """The function that a user called."""
    name = case.name.split()[0].strip(",")
    return {"VNEntropy": "vn_entropy", "DoELoss": "doe_loss"}.get(name, name)


@cache
def outcome(case: Case, transform: str) -> str:
    """Whether the result is "right" or "refused"; an error for what is neither."""
    apply, x = TRANSFORMS[transform], case.argument()
    try:
        found = apply(case.function, x)
    except NotImplementedError as error:
        if typed(case) not in str(error):
            raise
        return "refused"
    torch.testing.assert_close(found, apply(case.formula, x), rtol=1e-8, atol=1e-9)
    return "right"


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_right_or_refused(case: Case, transform: str) -> None:
    order = 1 if transform in FIRST else 2 if transform in SECOND else 3
    assert outcome(case, transform) == ("right" if order <= case.order else "refused")


COMPILED = (
    "vn_entropy",
    "renyi_entropy, order 3",
    "participation_ratio",
    "vn_entropy_from_density",
    "relative_entropy",
)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["grad", "jvp"])
@pytest.mark.parametrize("name", COMPILED)
def test_no_silent_zero_under_compile(name: str, transform: str) -> None:
    """Dynamo falls back to eager, or refuses where it must not."""
    case = next(case for case in CASES if case.name == name)
    x = case.argument()
    expected = TRANSFORMS[transform](case.function, x)
    torch._dynamo.reset()
    compiled = torch.compile(partial(TRANSFORMS[transform], case.function), backend="aot_eager")
    try:
        found = compiled(x)
    except torch._dynamo.exc.TorchRuntimeError:  # of torch 2.10, where this falls back in 2.14
        assert torch.__version__ < (2, 14)
        return
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("make", [vne.DensityAccumulator, EffectiveRank])
def test_sums_of_rows_refuse_what_they_would_lose(make: Callable[[int], Any]) -> None:
    sums = make(6)
    for transform in ("grad", "jvp", "forward_ad"):
        with pytest.raises(NotImplementedError, match="DensityAccumulator"):
            TRANSFORMS[transform](lambda x: sums.update(x) or x.sum(), wide())


def test_forward_mode_is_refused_in_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(partial(by_jvp, vne.vn_entropy), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="vne_kernels"):
        compiled(wide())


# ---------------------------------------------------------------------------------------------
# The table of the README
# ---------------------------------------------------------------------------------------------

README = Path(__file__).resolve().parent.parent / "README.md"
MARKED = re.compile(r"(?<=<!-- transforms -->\n).*?(?=<!-- /transforms -->)", re.DOTALL)
COLUMNS = {
    "`grad`, `vjp`, `jacrev`": ("grad", "vjp", "jacrev"),
    "`jvp`, `jacfwd`, `forward_ad`": ("jvp", "jacfwd", "forward_ad"),
    "`vmap` of these": ("vmap of grad", "vmap of jvp"),
    "`hessian` and other pairs": tuple(SECOND),
}


def table() -> str:
    """A line for each function: under which transforms all of its cases are right."""
    lines = ["| function | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    cells: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(typed(case) for case in CASES):
        cases = [case for case in CASES if typed(case) == name]
        found = [
            {outcome(case, transform) for case in cases for transform in transforms}
            for transforms in COLUMNS.values()
        ]
        words = {("right",): "right", ("refused",): "refused"}
        row = tuple(words.get(tuple(outcomes), "right for order 1") for outcomes in found)
        cells.setdefault(row, []).append(f"`{name}`")
    lines += [f"| {', '.join(names)} | {' | '.join(row)} |" for row, names in cells.items()]
    return "\n".join(lines) + "\n"


@pytest.mark.cpu_only("a page, the same for all")
def test_the_table_of_the_readme_is_made_of_these_results() -> None:
    assert MARKED.findall(README.read_text(encoding="utf-8")) == [table()]


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(MARKED.sub(lambda _: table(), text), encoding="utf-8")
