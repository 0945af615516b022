"""Real networks that nobody here trained: null neurons are found without data, and no logit moves."""

import pytest
import torch
import zoo
from zoo import needs_data

import ep_prune as ep

pytestmark = [pytest.mark.data, needs_data]


@pytest.mark.parametrize(("depth", "gone", "inner"), [(20, 13, 336), (56, 52, 1008)])
def test_cifar_resnets_lose_their_null_neurons(depth: int, gone: int, inner: int) -> None:
    wide = zoo.load_cifar_resnet(depth)
    result = ep.reduce(wide, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), tol=1e-6)
    spaces = [s for s in result.report.spaces if s.name.startswith("layer") and s.name.endswith("conv1")]
    assert sum(space.before for space in spaces) == inner
    assert sum(space.before - space.after for space in spaces) >= gone
    assert result.report.grade == "bounded" and result.verification.difference <= 1e-6

    x, _ = zoo.cifar_test(zoo.IMAGENET_MEAN, zoo.IMAGENET_STD)
    with torch.no_grad():
        before, after = wide(x), result.model(x)
    assert float((before - after).abs().max()) <= 1e-4
    assert torch.equal(before.argmax(1), after.argmax(1))


def test_grade_exact_leaves_what_only_statistics_call_null() -> None:
    wide = zoo.load_cifar_resnet(20)
    result = ep.reduce(wide, torch.zeros(2, 3, 32, 32), verify_result=False)
    assert result.report.after == result.report.before


def test_the_users_own_probes_are_what_tol_is_about() -> None:
    wide = zoo.load_cifar_resnet(20)
    x, y = zoo.cifar_train(zoo.IMAGENET_MEAN, zoo.IMAGENET_STD)
    result = ep.reduce(wide, x[:2], tol=1e-3, probes=[(x[:64], y[:64])])
    assert not result.verification.synthetic
    assert result.verification.difference <= 1e-3
    assert result.report.after.parameters < result.report.before.parameters
