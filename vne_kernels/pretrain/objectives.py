"""What an encoder is trained by: a loss with the heads and stop-gradients it was published with.

An objective turns the features of two views into :class:`Terms`. Losses and heads are lightly's
where it has them; the differences of entropies are this package's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from lightly.loss import (  # type: ignore[import-untyped]
    BarlowTwinsLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    VICRegLoss,
)
from lightly.models.modules.heads import (  # type: ignore[import-untyped]
    BarlowTwinsProjectionHead,
    BYOLPredictionHead,
    BYOLProjectionHead,
    ProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
    VICRegProjectionHead,
)
from lightly.models.utils import (  # type: ignore[import-untyped]
    deactivate_requires_grad,
    update_momentum,
)
from lightly.utils.scheduler import cosine_schedule  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F

from vne_kernels import DoEComponents, doe_loss, vn_entropy
from vne_kernels.distributed import default_group, gather
from vne_kernels.pretrain.config import Config

BYOL_MOMENTUM = 0.996  # of the target network at the first step, rising to 1 (Grill et al. 2020)
SIMSIAM_BOTTLENECK = 4  # the predictor's hidden layer is a quarter of its ends (Chen and He 2020)


class Terms(NamedTuple):
    """What an objective says of one batch of pairs; scalars but for the embeddings."""

    loss: Tensor
    #: (n, d), the embeddings of the two views, not normalised
    z1: Tensor
    z2: Tensor
    #: the estimate of the entropy or mutual information that the loss maximises, nats; NaN: none
    information: Tensor
    #: von Neumann entropy of the first view's embeddings, nats, and mean cosine of the pairs
    entropy: Tensor
    cosine: Tensor


def info_nce(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """InfoNCE's estimate of the mutual information I(Z1; Z2), at most log n.

    log n - cross entropy of telling each row's partner among the n rows of the other view, by
    cosine similarity over ``temperature``. I(Z1; Z1) estimates the entropy of Z1.

    Args:
        z1, z2: (n, d), row i of one belonging to row i of the other.
        temperature: what the cosine similarities are divided by.

    Returns:
        (), in nats, float32.

    Source: Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018.
    """
    with torch.autocast(z1.device.type, enabled=False):
        u1, u2 = F.normalize(z1.float(), dim=-1), F.normalize(z2.float(), dim=-1)
        partner = torch.arange(len(u1), device=u1.device)
        return math.log(len(u1)) - F.cross_entropy(u1 @ u2.T / temperature, partner)


class Objective(nn.Module):
    """A loss with its heads. ``projector``: features (n, f) -> embeddings (n, d)."""

    projector: nn.Module

    def forward(self, h1: Tensor, h2: Tensor, images: tuple[Tensor, Tensor], beta: float) -> Terms:
        """Terms of the features (n, f) of two views and of the views themselves."""
        raise NotImplementedError

    def heads(self) -> list[nn.Module]:
        """The networks between the features and the loss."""
        return [self.projector]

    def follow(self, encoder: nn.Module, step: int, steps: int) -> None:
        """Called before each step: a momentum network goes after the trained one."""

    def fixed_lr_parameters(self) -> list[nn.Parameter]:
        """Those that keep the peak learning rate all along."""
        return []


class DifferenceOfEntropies(Objective):
    """-H(Z1) - beta * mean cosine(z1, z2), by three estimates of the entropy H.

    Processes gather their embeddings: the loss is that of the whole batch.
    """

    def __init__(self, config: Config, features: int) -> None:
        super().__init__()
        assert config.projector_layers is not None
        self.config = config
        self.projector = paper_projector(
            features, config.projector_hidden, config.projector_layers, config.projector_dim
        )

    def forward(self, h1: Tensor, h2: Tensor, images: tuple[Tensor, Tensor], beta: float) -> Terms:
        z1, z2 = self._project(h1, h2)
        loss, entropy, cosine = global_doe(z1, z2, beta, self.config.method)
        entropy, cosine = entropy.detach(), cosine.detach()
        return Terms(loss, z1, z2, entropy, entropy, cosine)

    def _project(self, h1: Tensor, h2: Tensor) -> tuple[Tensor, Tensor]:
        return both_views(self.projector, h1, h2, self.config)


class SymmetricDifferenceOfEntropies(DifferenceOfEntropies):
    """The entropy of both views, their mean: -(S(U1) + S(U2)) / 2 - beta * cosine."""

    def forward(self, h1: Tensor, h2: Tensor, images: tuple[Tensor, Tensor], beta: float) -> Terms:
        z1, z2 = self._project(h1, h2)
        one, other = torch.stack([z1, z2]), torch.stack([z2, z1])
        loss, entropies, cosines = global_doe(one, other, beta, self.config.method)
        entropies, cosine = entropies.detach(), cosines[0].detach()
        return Terms(loss.mean(), z1, z2, entropies.mean(), entropies[0], cosine)


class ShannonDifferenceOfEntropies(DifferenceOfEntropies):
    """The paper's failed variant: the entropy as InfoNCE's self-information I(Z1; Z1)."""

    def forward(self, h1: Tensor, h2: Tensor, images: tuple[Tensor, Tensor], beta: float) -> Terms:
        z1, z2 = self._project(h1, h2)
        all1, all2 = gather(z1, equal=True), gather(z2, equal=True)
        information = info_nce(all1, all1, self.config.temperature)
        cosine = _cosine(all1, all2)
        entropy = vn_entropy(all1.detach())
        return Terms(
            -information - beta * cosine, z1, z2, information.detach(), entropy, cosine.detach()
        )


class Published(Objective):
    """A loss of lightly's between two embeddings, with its projector.

    ``gathers``: the loss is not a mean over pairs, and is taken of those of all processes together.
    (lightly's own sums over processes have a gradient that is wrong by their number.)
    """

    gathers = False

    def __init__(self, config: Config, projector: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.projector = projector
        self.criterion = criterion

    def forward(self, h1: Tensor, h2: Tensor, images: tuple[Tensor, Tensor], beta: float) -> Terms:
        z1, z2 = both_views(self.projector, h1, h2, self.config)
        all1, all2 = z1, z2
        if self.gathers:
            all1, all2 = gather(z1, equal=True), gather(z2, equal=True)
        with torch.autocast(z1.device.type, enabled=False):
            loss = self.criterion(all1.float(), all2.float())
        return self._terms(loss, z1, z2)

    def _terms(self, loss: Tensor, z1: Tensor, z2: Tensor) -> Terms:
        one, other = z1.detach(), z2.detach()
        _, entropy, cosine = global_doe(one, other, 0.0, "auto")
        return Terms(loss, z1, z2, self._information(one, other), entropy, cosine)

    def _information(self, z1: Tensor, z2: Tensor) -> Tensor:
        return torch.full((), math.nan, device=z1.device)


class SimCLR(Published):
    """NT-Xent (Chen et al. 2020); its information is InfoNCE's I(Z1; Z2) (Oord et al. 2018)."""

    def __init__(self, config: Config, features: int) -> None:
        assert config.projector_layers is not None
        projector = SimCLRProjectionHead(
            features,
            config.projector_hidden,
            config.projector_dim,
            num_layers=config.projector_layers + 1,
        )
        criterion = NTXentLoss(temperature=config.temperature, gather_distributed=True)
        super().__init__(config, projector, criterion)

    def _information(self, z1: Tensor, z2: Tensor) -> Tensor:
        return info_nce(gather(z1, equal=True), gather(z2, equal=True), self.config.temperature)


class Predicted(Published):
    """Each view's target is predicted from the other view; targets get no gradient."""

    def __init__(self, config: Config, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__(config, projector, NegativeCosineSimilarity())
        self.predictor = predictor

    def forward(self, h1: Tensor, h2: Tensor, images: tuple[Tensor, Tensor], beta: float) -> Terms:
        z1, z2 = both_views(self.projector, h1, h2, self.config)
        p1, p2 = both_views(self.predictor, z1, z2, self.config)
        t1, t2 = self._targets(z1, z2, images)
        with torch.autocast(z1.device.type, enabled=False):
            crossed = self.criterion(p1.float(), t2.float()), self.criterion(p2.float(), t1.float())
        return self._terms((crossed[0] + crossed[1]) / 2, z1, z2)

    def heads(self) -> list[nn.Module]:
        return [self.projector, self.predictor]

    def _targets(
        self, z1: Tensor, z2: Tensor, images: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class SimSiam(Predicted):
    """The target is the other view's embedding, its gradient stopped (Chen and He 2020)."""

    def __init__(self, config: Config, features: int) -> None:
        dim = config.projector_dim
        super().__init__(
            config,
            SimSiamProjectionHead(features, config.projector_hidden, dim),
            SimSiamPredictionHead(dim, max(1, dim // SIMSIAM_BOTTLENECK), dim),
        )

    def _targets(
        self, z1: Tensor, z2: Tensor, images: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return z1.detach(), z2.detach()

    def fixed_lr_parameters(self) -> list[nn.Parameter]:
        return list(self.predictor.parameters())


class BYOL(Predicted):
    """The target is a second network, the running mean of the first (Grill et al. 2020)."""

    def __init__(self, config: Config, features: int, encoder: nn.Module) -> None:
        hidden, dim = config.projector_hidden, config.projector_dim
        projector = BYOLProjectionHead(features, hidden, dim)
        super().__init__(config, projector, BYOLPredictionHead(dim, hidden, dim))
        self.target = nn.Sequential(copy.deepcopy(encoder), copy.deepcopy(projector))
        deactivate_requires_grad(self.target)

    @torch.no_grad()
    def _targets(
        self, z1: Tensor, z2: Tensor, images: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return both_views(self.target, *images, self.config)

    def follow(self, encoder: nn.Module, step: int, steps: int) -> None:
        momentum = cosine_schedule(step, steps, BYOL_MOMENTUM, 1.0)
        update_momentum(encoder, self.target[0], momentum)
        update_momentum(self.projector, self.target[1], momentum)


class BarlowTwins(Published):
    """Cross-correlation of the two views to the identity (Zbontar et al. 2021)."""

    gathers = True

    def __init__(self, config: Config, features: int) -> None:
        hidden, dim = config.projector_hidden, config.projector_dim
        super().__init__(
            config, BarlowTwinsProjectionHead(features, hidden, dim), BarlowTwinsLoss()
        )


class VICReg(Published):
    """Invariance, variance and covariance (Bardes et al. 2022)."""

    gathers = True

    def __init__(self, config: Config, features: int) -> None:
        assert config.projector_layers is not None
        projector = VICRegProjectionHead(
            features,
            config.projector_hidden,
            config.projector_dim,
            num_layers=config.projector_layers + 1,
        )
        super().__init__(config, projector, VICRegLoss())


#: --loss -> (config, width of the features, encoder) -> Objective
OBJECTIVES: dict[str, Callable[[Config, int, nn.Module], Objective]] = {
    "vn-doe": lambda config, features, _: DifferenceOfEntropies(config, features),
    "vn-doe-symmetric": lambda config, features, _: SymmetricDifferenceOfEntropies(
        config, features
    ),
    "shannon-doe": lambda config, features, _: ShannonDifferenceOfEntropies(config, features),
    "simclr": lambda config, features, _: SimCLR(config, features),
    "simsiam": lambda config, features, _: SimSiam(config, features),
    "byol": BYOL,
    "barlow": lambda config, features, _: BarlowTwins(config, features),
    "vicreg": lambda config, features, _: VICReg(config, features),
}


def paper_projector(features: int, hidden: int, layers: int, dim: int) -> ProjectionHead:
    """features -> hidden, ``layers`` times with batch norm and ReLU -> dim (Appendix C)."""
    widths = [features, *[hidden] * layers]
    blocks = [(a, b, nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(widths)]
    return ProjectionHead([*blocks, (widths[-1], dim, None, None)])


def both_views(
    network: Callable[[Tensor], Tensor], first: Tensor, second: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """``network`` over two views, its batch norms over both together or each on its own."""
    if config.batch_norm == "per-view":
        return network(first), network(second)
    one, two = network(torch.cat([first, second])).chunk(2)
    return one, two


def global_doe(z1: Tensor, z2: Tensor, beta: float, method: str) -> DoEComponents:
    """The loss of the pairs of all processes, whose batches are of one size."""
    components = doe_loss(
        z1,
        z2,
        beta=beta,
        method=method,
        return_components=True,
        group=default_group(),
        max_rows=z1.shape[-2],
    )
    assert isinstance(components, DoEComponents)
    return components


def _cosine(z1: Tensor, z2: Tensor) -> Tensor:
    return F.cosine_similarity(z1.float(), z2.float(), dim=-1).mean()
