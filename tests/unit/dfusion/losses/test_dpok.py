import numpy as np
import pytest
import torch

from dfusion.errors import ScheduleError, ShapeMismatchError
from dfusion.losses.dpok import dpok_loss, gaussian_kl


def _means(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean, reference = torch.randn(2, batch, 4, 3, 5, generator=generator)
    return mean, reference, torch.rand(batch, generator=generator) + 0.1


def test_kl_by_hand() -> None:
    """Means 0.3 apart everywhere, sigma 0.5: 0.09 / 0.5; half of the pixels 0.3 apart: half of that."""
    mean = torch.full((2, 1, 2, 2), 0.3)
    reference = torch.zeros(2, 1, 2, 2)
    sigma = torch.tensor([0.5, 0.5])
    mean[1, 0, 0] = 0
    assert gaussian_kl(mean, reference, sigma).tolist() == [pytest.approx(0.18), pytest.approx(0.09)]


def test_kl_is_that_of_the_distributions() -> None:
    mean, reference, sigma = _means()
    scale = sigma.reshape(-1, 1, 1, 1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, scale), normal(reference, scale)).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_kl(mean, reference, sigma), expected)


@pytest.mark.parametrize("batch", [1, 3])  # a divergence taken over the batch would vanish at 1
def test_kl_is_positive_and_zero_at_equality(batch: int) -> None:
    mean, reference, sigma = _means(batch)
    assert (gaussian_kl(mean, reference, sigma) > 0).all()
    assert gaussian_kl(mean, mean.clone(), sigma).tolist() == [0.0] * batch


def test_kl_gradient_points_away_from_the_reference() -> None:
    """(mu - mu_ref) / (sigma^2 * elements), and finite differences of numpy's value."""
    mean, reference, sigma = (x.double() for x in _means(1))
    mean.requires_grad_()
    gaussian_kl(mean, reference, sigma).sum().backward()
    torch.testing.assert_close(mean.grad, (mean.detach() - reference) / (sigma**2 * 60))

    def value(x: np.ndarray) -> float:
        return float(np.mean((x - reference.numpy()) ** 2) / (2 * sigma.item() ** 2))

    start = mean.detach().numpy()
    width = 1e-6
    for place in ((0, 0, 0, 0), (0, 3, 2, 4)):
        shift = np.zeros_like(start)
        shift[place] = width
        slope = (value(start + shift) - value(start - shift)) / (2 * width)
        assert mean.grad[place].item() == pytest.approx(slope, rel=1e-6)


def test_loss_by_hand() -> None:
    """alpha * -A + beta * KL at the old policy; the clip limits the first term, not the second."""
    advantage = torch.tensor([2.0])
    kl = torch.tensor([0.5])
    at_old = dpok_loss(torch.zeros(1), torch.zeros(1), advantage, kl, 0.2, 10.0, 0.01)

    assert at_old.item() == pytest.approx(10 * -2 + 0.01 * 0.5)

    raised = torch.ones(1, requires_grad=True)
    kl = kl.requires_grad_()
    loss = dpok_loss(raised, torch.zeros(1), advantage, kl, 0.2, 10.0, 0.01)
    loss.sum().backward()

    assert loss.item() == pytest.approx(10 * -2.4 + 0.01 * 0.5)
    assert (raised.grad.item(), kl.grad.item()) == (0, pytest.approx(0.01))


def test_a_divergence_without_noise_is_rejected() -> None:
    mean, reference, sigma = _means()
    with pytest.raises(ScheduleError, match="sigma"):
        gaussian_kl(mean, reference, sigma * 0)
    for arguments in ((mean, reference[:1], sigma), (mean, reference, sigma[:1])):
        with pytest.raises(ShapeMismatchError, match="reference_mean"):
            gaussian_kl(*arguments)
