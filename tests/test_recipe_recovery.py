"""The recipes of recovery and dimension with --quick, and the clustering that the first compares with."""

import json

import pytest
import torch

from recipes.embedding_principle import dimension, recovery
from recipes.embedding_principle._small_networks import dense, inputs_of


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    out = tmp_path_factory.mktemp("recovery")
    recovery.main(["--quick", "--out", str(out)])
    return out, json.loads((out / "recovery.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    out = tmp_path_factory.mktemp("dimension")
    dimension.main(["--quick", "--out", str(out)])
    return out, json.loads((out / "dimension.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["forward", "critical"])
def test_the_sweep_recovers_the_narrow_network_at_every_seed_and_clustering_each_layer_at_none(recovered, kind):
    trials = recovered[1][kind]["trials"]
    assert len(trials) == 3
    for trial in trials:
        assert trial["embedding error"] <= 1e-12
        assert trial["sweep"]["widths"] == [3, 4]
        assert trial["sweep"]["error"] <= 1e-10
        for found in trial["each layer"]:
            assert found["widths"] != [3, 4] or found["error"] > 1e-2
    assert recovered[1][kind]["methods"]["sweep"]["seeds exact"] == 3
    for row in recovered[1][kind]["methods"]["each layer"].values():
        assert row["seeds exact"] == 0


def test_clustering_in_order_at_a_narrow_threshold_does_find_them(recovered):
    """So that it is the order that counts, and the comparison gives clustering its due."""
    assert recovered[1]["forward"]["methods"]["in order"]["0.999"]["seeds exact"] == 3


def test_copies_are_parallel_in_layer_1_and_not_in_layer_2(recovered):
    first, second = recovered[1]["forward"]["layers"]
    assert first["true copies"]["share at or above"]["0.999"] == 1
    assert second["true copies"]["share at or above"]["0.9"] == 0
    assert second["true copies"]["mean"] < 0.6
    for layer in (first, second):
        for kind in layer.values():
            assert sum(kind["histogram"]) == kind["pairs"] > 0


def test_other_networks_are_recovered_too(recovered):
    rows = recovered[1]["other networks"]
    assert len(rows) == 3
    for row in rows:
        assert row["error"] <= 1e-10
        assert all(space["wide"] > space["narrow"] == space["sweep"] for space in row["spaces"])


def test_clustering_merges_plain_copies_with_their_signs_and_folds_constants():
    """Where only layer 1 is widened, the clustering that the recipe compares with is exact."""
    narrow = dense((3, 3, 4, 2), "tanh", 0)
    x = inputs_of(narrow, 50, 1)
    wide = recovery.embed(narrow, x, widths={"0": 9}, critical=False, seed=4)
    assert (wide[0].weight == 0).all(1).any()  # a null, whose constant must be folded
    for in_order in (False, True):
        found = recovery.clustered(wide, 0.999, in_order)
        assert recovery.widths_of(found) == [3, 4]
        assert recovery.difference(found, narrow, x) <= 1e-13


def test_pairs_are_of_copies_or_of_distinct_neurons():
    copies, distinct = recovery.pairs((0, -1, 1, 0))
    assert copies.nonzero().tolist() == [[0, 3]]
    assert distinct.nonzero().tolist() == [[0, 2], [2, 3]]


def test_the_formula_is_the_rank(counted):
    table = counted[1]
    assert len(table["two layers"]) == 6 and len(table["deeper"]) == 2
    for row in table["two layers"] + table["deeper"]:
        assert row["formula"] + row["batch norm"] == row["rank"] > 0
        assert row["formula"] == row["gained"] + row["mixed"] + row["symmetries"]
        assert row["gap"][0] > 1e-3 and row["gap"][1] < 1e-7
    assert all(row["batch norm"] == 0 for row in table["two layers"])
    assert table["deeper"][0]["mixed"] == 3 * 4
    assert table["deeper"][1]["batch norm"] == 1 + 2 * 9  # a free gain; a whole filter behind a gain of 0


@pytest.mark.parametrize("name, run", [("recovery", "recovered"), ("dimension", "counted")])
def test_pictures_are_drawn(name, run, request):
    out, _ = request.getfixturevalue(run)
    assert (out / f"{name}.png").stat().st_size > 20_000
    assert not list(out.glob("*.part*"))


def test_cosines_have_signs_and_do_not_divide_by_zero():
    rows = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(
        recovery.cosines(rows), torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 0]], dtype=torch.float64)
    )
