"""What each ``--loss`` computes: against its definition written out, and where gradients may go."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vne_kernels import reference, vn_entropy
from vne_kernels.pretrain.config import DIFFERENCES_OF_ENTROPIES, LOSSES, Config, Options
from vne_kernels.pretrain.model import Pretraining, beta_at
from vne_kernels.pretrain.objectives import BYOL_MOMENTUM, OBJECTIVES, Objective, Terms, info_nce

FEATURES, BATCH, BETA = 12, 16, 3.0


class Encoder(nn.Module):
    """Stands for a ResNet: images (n, 3, 4, 4) -> features (n, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, FEATURES)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layer(images.flatten(1)).relu()
        return features


def config(loss: str, **more: object) -> Config:
    head = {"projector_dim": 8, "projector_hidden": 20, "temperature": 0.2}
    return Options(data="digits", loss=loss, **head | more).resolved(8)  # type: ignore[arg-type]


def make(loss: str, **more: object) -> tuple[Encoder, Objective]:
    torch.manual_seed(0)
    encoder = Encoder()
    return encoder, OBJECTIVES[loss](config(loss, **more), FEATURES, encoder)


def views() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    first = torch.randn(BATCH, 3, 4, 4)
    return first, first + 0.3 * torch.randn_like(first)


def terms_of(encoder: Encoder, objective: Objective) -> Terms:
    images = views()
    result: Terms = objective(encoder(images[0]), encoder(images[1]), images, BETA)
    return result


def cosine(z1: Tensor, z2: Tensor) -> Tensor:
    return (F.normalize(z1, dim=1) * F.normalize(z2, dim=1)).sum(1).mean()


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Chen et al. 2020, equation (1), over the 2n rows, each against 2n - 1 others."""
    u = F.normalize(torch.cat([z1, z2]), dim=1)
    similarity = u @ u.T / temperature
    similarity.fill_diagonal_(-math.inf)
    partner = torch.arange(2 * len(z1)).roll(len(z1))
    return F.cross_entropy(similarity, partner)


def barlow(z1: Tensor, z2: Tensor) -> Tensor:
    """Zbontar et al. 2021, Algorithm 1, lambda = 5e-3."""
    # a batch norm standardises, with its eps of 1e-5
    a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (z1, z2))
    c = a.T @ b / len(z1)
    on = (c.diagonal() - 1).square().sum()
    off = c.square().sum() - c.diagonal().square().sum()
    return on + 5e-3 * off


def vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    """Bardes et al. 2021: 25 invariance + 25 variance + 1 covariance."""
    variance, covariance = 0.0, 0.0
    for z in (z1, z2):
        z = z - z.mean(0)
        variance = variance + F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
        c = z.T @ z / (len(z) - 1)
        covariance = covariance + (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]
    return 25 * F.mse_loss(z1, z2) + 25 * variance + covariance


DEFINITIONS = {
    "vn-doe": lambda z1, z2: reference.algorithm1_loss(z1, z2, BETA),
    "vn-doe-symmetric": lambda z1, z2: (
        (reference.algorithm1_loss(z1, z2, BETA) + reference.algorithm1_loss(z2, z1, BETA)) / 2
    ),
    "shannon-doe": lambda z1, z2: -info_nce(z1, z1, 0.2) - BETA * cosine(z1, z2),
    "simclr": lambda z1, z2: nt_xent(z1, z2, 0.2),
    "barlow": barlow,
    "vicreg": vicreg,
}


@pytest.mark.parametrize("loss", DEFINITIONS)
def test_loss_is_its_definition(loss: str) -> None:
    terms = terms_of(*make(loss))
    torch.testing.assert_close(
        terms.loss, DEFINITIONS[loss](terms.z1, terms.z2), rtol=1e-4, atol=1e-5
    )


def test_predicted_losses_are_their_definition() -> None:
    for loss in ("simsiam", "byol"):
        encoder, objective = make(loss, batch_norm="per-view")
        terms = terms_of(encoder, objective)
        p1, p2 = objective.predictor(terms.z1), objective.predictor(terms.z2)
        if loss == "simsiam":
            t1, t2 = terms.z1, terms.z2
        else:
            t1, t2 = (objective.target(view) for view in views())
        torch.testing.assert_close(terms.loss, -(cosine(p1, t2) + cosine(p2, t1)) / 2)


@pytest.mark.parametrize("loss", LOSSES)
def test_terms(loss: str) -> None:
    encoder, objective = make(loss)
    terms = terms_of(encoder, objective)
    torch.testing.assert_close(terms.entropy, vn_entropy(terms.z1.detach()))
    torch.testing.assert_close(terms.cosine, cosine(terms.z1, terms.z2).detach())
    assert not any(x.requires_grad for x in (terms.information, terms.entropy, terms.cosine))
    expected = {
        "vn-doe": terms.entropy,
        "vn-doe-symmetric": (vn_entropy(terms.z1) + vn_entropy(terms.z2)) / 2,
        "shannon-doe": info_nce(terms.z1, terms.z1, 0.2),
        "simclr": info_nce(terms.z1, terms.z2, 0.2),
    }.get(loss, torch.tensor(math.nan))
    torch.testing.assert_close(terms.information, expected.detach(), equal_nan=True)
    terms.loss.backward()
    trained = [*encoder.parameters(), *objective.parameters()]
    for parameter in trained:
        assert (parameter.grad is not None) == parameter.requires_grad
        assert parameter.grad is None or parameter.grad.isfinite().all()
    assert encoder.layer.weight.grad is not None
    assert encoder.layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_autocast_keeps_losses_in_float32(loss: str) -> None:
    encoder, objective = make(loss)
    with torch.autocast("cpu", torch.bfloat16):
        terms = terms_of(encoder, objective)
    assert terms.loss.dtype == torch.float32
    torch.testing.assert_close(terms.loss, terms_of(*make(loss)).loss, rtol=0.05, atol=0.05)


def test_simsiam_stops_the_gradient_of_its_targets() -> None:
    """With predictions that are constant, nothing is left for the encoder."""
    encoder, objective = make("simsiam")
    for parameter in objective.predictor.parameters():
        nn.init.zeros_(parameter)
    terms_of(encoder, objective).loss.backward()
    assert encoder.layer.weight.grad.abs().max() == 0


def test_byols_target_follows() -> None:
    encoder, objective = make("byol")
    before = objective.target[0].layer.weight.clone()
    with torch.no_grad():
        encoder.layer.weight += 1.0
    objective.follow(encoder, step=0, steps=10)
    torch.testing.assert_close(
        objective.target[0].layer.weight, before + (1 - BYOL_MOMENTUM), rtol=0, atol=1e-5
    )
    at_the_end = objective.target[0].layer.weight.clone()
    objective.follow(encoder, step=9, steps=10)  # momentum 1: it does not move
    assert torch.equal(objective.target[0].layer.weight, at_the_end)


def test_info_nce() -> None:
    z = torch.eye(8)
    independent = torch.ones(8, 4)
    assert float(info_nce(z, z, 0.01)) == pytest.approx(math.log(8), abs=1e-6)  # all differ
    assert float(info_nce(independent, independent, 0.1)) == pytest.approx(0, abs=1e-6)
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 9, 5)
    u1, u2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    score = (u1 @ u2.T / 0.3).exp()
    wanted = (score.diagonal() / score.mean(1)).log().mean()  # Oord et al. 2018
    torch.testing.assert_close(info_nce(z1, z2, 0.3), wanted)
    assert float(info_nce(z1, z2, 0.3)) <= math.log(9)


def test_batch_norms_of_each_view() -> None:
    """Per view, a view's embeddings do not depend on the other view; jointly they do."""
    for batch_norm, equal in (("per-view", True), ("joint", False)):
        encoder, objective = make("vn-doe", batch_norm=batch_norm)
        first, second = views()
        one = objective(encoder(first), encoder(second), (first, second), BETA).z1
        two = objective(encoder(first), encoder(first * 2), (first, first), BETA).z1
        assert torch.equal(one, two) == equal


# ---- in the training module --------------------------------------------------------------------


def module(loss: str, **more: object) -> Pretraining:
    small = {"backbone": "resnet18", "epochs": 4, "warmup_epochs": 1, "lr": 1.0}
    return Pretraining(config(loss, **small | more), total_steps=40, classes=3)


def test_every_trained_parameter_has_one_optimiser_group_and_no_other_has() -> None:
    for loss in ("vn-doe", "simsiam", "byol"):
        model = module(loss)
        groups = model.configure_optimizers()["optimizer"].param_groups
        grouped = [id(p) for group in groups for p in group["params"]]
        trained = [id(p) for p in model.parameters() if p.requires_grad]
        assert sorted(grouped) == sorted(trained)
        for group in groups:
            decayed = group["weight_decay"] > 0
            assert all((p.ndim > 1) == decayed for p in group["params"]) or not decayed
    frozen = [name for name, p in module("byol").named_parameters() if not p.requires_grad]
    assert frozen
    assert all(name.startswith("objective.target.") for name in frozen)


def test_learning_rate_warms_up_and_falls_to_zero_but_for_simsiams_predictor() -> None:
    model = module("simsiam")
    made = model.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(40):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    peak = 1.0 * 128 / 256
    first, last = rates[0], rates[-1]
    assert first[:3] == pytest.approx([peak / 10] * 3)  # warm-up: ten steps of an epoch
    assert rates[9][:3] == pytest.approx([peak] * 3)
    assert last[:3] == pytest.approx([0.0] * 3, abs=1e-9)
    assert all(row[3:] == [peak, peak] for row in rates)
    predictor = {id(p) for p in model.objective.predictor.parameters()}
    assert {id(p) for group in optimizer.param_groups[3:] for p in group["params"]} == predictor


def test_beta_schedules() -> None:
    linear = config("vn-doe")
    assert [beta_at(step, 4, linear) for step in range(4)] == [1.0, 4.0, 7.0, 10.0]
    assert beta_at(0, 1, linear) == 1.0
    constant = config("vn-doe", beta_schedule="constant", beta_start=2.0)
    assert {beta_at(step, 4, constant) for step in range(4)} == {2.0}
    assert set(DIFFERENCES_OF_ENTROPIES) < set(LOSSES)


def test_online_probe_learns_the_labels_and_tells_the_encoder_nothing() -> None:
    model = module("vn-doe")
    features = torch.randn(6, 512, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    model._probe_loss(features, labels).backward()
    assert features.grad is None
    assert model.probe.weight.grad is not None
