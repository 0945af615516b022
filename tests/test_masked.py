"""`reduce` on torchvision's networks with masked channels: the same outputs, never more parameters.

The networks are those of `benchmarks/masked_networks.py`, at small sizes. Constants in front of zero padding,
in residual streams, concatenations, gates, depthwise and grouped convolutions: every way that torchvision
has.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# benchmarks/ is no part of the installed package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import masked_networks as masked

SEED = 0


@pytest.fixture(autouse=True)
def one_thread_and_memory_back() -> Iterator[None]:
    """One thread, and the network's memory (VGG-16 in float64: 1.1 GB) back before the next one is built."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    gc.collect()


@pytest.mark.parametrize("name", masked.NETWORKS)
def test_reduce_keeps_the_output_of_a_masked_network(name: str) -> None:
    import ep_prune as ep

    model = masked.masked_network(name, masked.chosen_fraction(name, SEED), SEED)
    inputs = masked.random_inputs(masked.TEST_SIZES[name], count=8, seed=SEED)
    wide = masked.outputs(model, inputs)
    assert masked.liveliness(wide) >= masked.LIVELY
    before = sum(p.numel() for p in model.parameters())

    result = ep.reduce(model, inputs[:2])

    narrow = masked.outputs(result.model, inputs)
    assert (narrow - wide).abs().max() <= 1e-10 * wide.abs().max()
    after = sum(p.numel() for p in result.model.parameters())
    assert after < before, "channels are constant, and none went"
    report = result.report.to_dict()
    assert (report["parameters_before"], report["parameters_after"]) == (before, after)
    assert report["macs_after"] < report["macs_before"]


def test_every_network_has_a_measured_fraction() -> None:
    cached = masked.read_fractions()[str(SEED)]
    assert set(cached) == set(masked.NETWORKS)
    assert all(entry["fraction"] in masked.FRACTIONS for entry in cached.values())
    assert all(entry["liveliness"] >= masked.LIVELY for entry in cached.values())


@pytest.mark.parametrize("stress", [False, True])
def test_masked_channels_are_constant_and_their_gains_zero(stress: bool) -> None:
    model = masked.masked_network("resnet18", 0.5, SEED, stress)
    norms = masked.batch_norms_of_convolutions(model.float(), 64)
    assert len(norms) == 20
    for convolution, norm in norms.items():
        weight_masked = convolution.weight.flatten(1).abs().sum(dim=1) == 0
        gain_masked = norm.weight == 0
        assert int(weight_masked.sum()) == int(gain_masked.sum()) == convolution.out_channels // 2
        assert torch.equal(weight_masked, gain_masked) != stress


@pytest.mark.parametrize(
    ("name", "with_norm"),
    [("vgg11_bn", 8), ("squeezenet1_0", 0), ("densenet121", 59), ("googlenet", 57), ("mobilenet_v2", 52)],
)
def test_the_batch_norm_of_a_convolution_is_the_one_that_reads_it(name: str, with_norm: int) -> None:
    """DenseNet: the stem and 58 bottlenecks; its other convolutions end in a concatenation."""
    model = masked.masked_network(name, 0.1, SEED).float()
    norms = masked.batch_norms_of_convolutions(model, masked.TEST_SIZES[name])
    assert len(norms) == with_norm
    assert len(set(norms.values())) == with_norm
    assert all(norm.num_features == convolution.out_channels for convolution, norm in norms.items())


def test_networks_are_the_same_for_the_same_seed_and_leave_the_random_state() -> None:
    state = torch.get_rng_state()
    first, second = (masked.masked_network("mobilenet_v3_small", 0.3, SEED).state_dict() for _ in range(2))
    other = masked.masked_network("mobilenet_v3_small", 0.3, SEED + 1).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["features.0.0.weight"], other["features.0.0.weight"])


def test_a_larger_fraction_masks_all_that_a_smaller_one_does() -> None:
    less, more = (masked.masked_network("squeezenet1_0", fraction, SEED) for fraction in (0.3, 0.6))
    for (_, one), (_, two) in zip(less.named_modules(), more.named_modules(), strict=True):
        if isinstance(one, torch.nn.Conv2d):
            assert (two.weight[one.weight == 0] == 0).all()
            assert torch.equal(one.bias, two.bias)
