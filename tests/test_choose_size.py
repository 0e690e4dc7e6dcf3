import functools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpa.documents import AdapterSpec
from qpa.errors import OptionError
from qpa.generators.size_search import Sized, choose_size, parse_max_params, sizes_around
from qpa.generators.spectral import SPECTRAL
from qpa.generators.vectors import types_by_length
from qpa.passes.plan_layout import PlanLayout
from tests.small_specs import NOWHERE, small_spec, spec_of


@functools.cache
def small(n_layers, rank):
    return small_spec(n_layers, rank)


@functools.cache
def all_plans(n_layers, rank):
    spec = small(n_layers, rank)
    return [Sized(plan, trained(plan, spec), 0.1) for plan in SPECTRAL.sizes(PLAN, spec)]


def trained(plan, spec):
    return plan.run(spec, NOWHERE).account.n_generator


PLAN = PlanLayout(generator="spectral")
SHAPES = st.tuples(st.integers(1, 5), st.integers(2, 6))


@given(SHAPES, st.integers(0, 4000))
@settings(max_examples=60, deadline=None)
def test_the_largest_plan_that_fits_is_chosen(shape, above):
    spec, plans = small(*shape), all_plans(*shape)
    budget = plans[0].n_trained + above
    chosen = choose_size(sizes_around(PLAN, spec, budget), budget)
    assert chosen.n_trained == max(sized.n_trained for sized in plans if sized.n_trained <= budget)
    assert trained(replace(PLAN, max_params=str(budget)), spec) == chosen.n_trained
    assert trained(chosen.options, spec) == chosen.n_trained


@given(SHAPES, st.integers(0, 4000), st.integers(0, 4000))
@settings(max_examples=60, deadline=None)
def test_a_larger_budget_never_gives_a_smaller_plan(shape, first, second):
    spec, smallest = small(*shape), all_plans(*shape)[0].n_trained
    low, high = (
        choose_size(sizes_around(PlanLayout(), spec, budget), budget).n_trained
        for budget in sorted((smallest + first, smallest + second))
    )
    assert low <= high


def test_vectors_come_before_a_second_head_and_the_longest_last():
    plans = [sized.options for sized in all_plans(3, 4)]
    vectors = [plan.vectors for plan in plans]
    assert vectors[0] == ("none",)
    assert [len(names) for names in vectors[1:5]] == [1, 2, 3, 4]
    assert set(vectors[1] + vectors[2]) == {"k_proj", "v_proj"}
    assert all("down_proj" not in names for names in vectors[:4])
    assert set(vectors[5:]) == {("all",)}
    assert [plan.circuits for plan in plans] == [1, 1, 1, 1, 1, 1, 2, 3, 6, 9]
    sizes = [sized.n_trained for sized in all_plans(3, 4)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("features", ["classical", "random", "bits"])
def test_the_features_of_the_plan_are_kept_and_counted(features):
    spec = small(3, 4)
    layout = PlanLayout(features=features, max_params="400").run(spec, NOWHERE)
    assert layout.features.kind == features
    assert layout.account.n_generator <= 400


def test_a_budget_above_everything_gives_the_largest_plan():
    layout = PlanLayout(max_params="1e12").run(small(3, 4), NOWHERE)
    assert layout.n_circuits == 9


@given(SHAPES, st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_below_the_default_s_smallest_size_a_state_is_planned(shape, budget):
    """Every budget from one number on has a plan, and the two generators meet without a gap."""
    spec = small(*shape)
    with_four = replace(PLAN, circuits=1, vectors=tuple(types_by_length(spec)[:4]))
    layout = PlanLayout(max_params=str(budget)).run(spec, NOWHERE)
    assert layout.generator == ("state" if budget < trained(with_four, spec) else "spectral")
    if budget < trained(with_four, spec) and len(layout.groups) == 1:
        assert 0 <= budget - layout.account.n_generator < layout.ansatz.n_qubits


def test_the_smallest_budgets_buy_the_scale_then_parities_then_circuits_then_tables_then_own_numbers():
    spec = small_spec(40, 4, {name: (100, 200) for name in "abcdefg"})  # 6 + 3 + 2 qubits, of 1,120 numbers
    expected = {
        1: ("constant", 1),
        2: ("log-linear", 2),
        12: ("log-linear", 12),
        24: ("log-linear", 24),
        25: ("signed", 1 + 2 * 12),
        204: ("signed", 1 + 16 * 12),
        205: ("tables", 1 + 4 * (40 + 7 + 4)),
        569: ("tables", 1 + 11 * (40 + 7 + 4)),
        620: ("own", 598),
    }
    for budget, features_and_size in expected.items():
        layout = PlanLayout(max_params=str(budget)).run(spec, NOWHERE)
        assert (layout.features.kind, layout.account.n_generator) == features_and_size


def test_vectors_come_where_they_fit_on_types_that_write_to_the_residual_stream():
    narrow = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (64, 64)}
    wide = {"gate_proj": (64, 172), "up_proj": (64, 172), "down_proj": (172, 64)}
    spec = small_spec(5, 32, narrow | wide)  # the shape of stories260K
    for budget, n_trained, vectors in (
        (193, 193, []),
        (194, 194, ["o_proj"]),
        (302, 302, ["down_proj"]),
        (543, 430, ["down_proj", "o_proj"]),
    ):
        layout = PlanLayout(max_params=str(budget)).run(spec, NOWHERE)
        assert (layout.features.kind, layout.account.n_generator) == ("signed", n_trained)
        assert sorted({group.name.split(".")[0] for group in layout.groups[:-1]}) == vectors
    assert PlanLayout(max_params="544").run(spec, NOWHERE).generator == "spectral"


def test_a_named_state_is_a_circuit_at_every_size():
    spec = small_spec(40, 4, {name: (100, 100) for name in "abcdefg"})
    for budget, n_trained in ((11, 1), (12, 12), (22, 12), (400, 1 + 11 * 36)):
        layout = PlanLayout(max_params=str(budget), generator="state").run(spec, NOWHERE)
        kind = "constant" if n_trained == 1 else "circuit"
        assert (layout.features.kind, layout.account.n_generator) == (kind, n_trained)


@pytest.mark.parametrize("options", [{"features": "classical"}, {"spectrum": False}, {"windows": False}])
def test_a_part_that_only_the_default_has_keeps_the_default(options):
    assert PlanLayout(max_params="400", **options).run(small(3, 4), NOWHERE).generator == "spectral"


# What a budget means


def test_a_percentage_is_of_lora_of_rank_4_whatever_the_rank():
    n_of_rank_1 = spec_of([("0.q", 8, 6), ("0.up", 8, 10)], 1).n_numbers
    for rank in (1, 2, 6):
        spec = spec_of([("0.q", 8, 6), ("0.up", 8, 10)], rank)
        assert parse_max_params("100%", spec) == 4 * n_of_rank_1
        assert parse_max_params("25%", spec) == n_of_rank_1
        assert parse_max_params("12.5%", spec) == n_of_rank_1 // 2


@pytest.mark.parametrize(("text", "number"), [("5000", 5000), ("5,000", 5000), ("5e3", 5000), ("99.9", 99)])
def test_a_number_of_parameters_is_read(text, number):
    assert parse_max_params(text, small(1, 2)) == number


@pytest.mark.parametrize(
    "text",
    ["0", "-3", "abc", "", "%", "0%", "-5%", "0.9", "nan", "inf", "-inf", "nan%", "1e400", "1e300", "5 %%"],
)
def test_what_is_no_budget_is_refused_in_one_line(text):
    message = r"^max_params: expected a number of parameters such as 5000, or a share such as 25%, found"
    with pytest.raises(OptionError, match=message) as caught:
        PlanLayout(max_params=text).run(small(2, 4), NOWHERE)
    assert "\n" not in str(caught.value)


def test_a_budget_too_small_says_how_much_it_takes():
    smallest = all_plans(2, 4)[0].n_trained
    assert trained(replace(PLAN, max_params=str(smallest)), small(2, 4)) == smallest
    with pytest.raises(OptionError, match=f"^max_params: expected at least {smallest}, found {smallest - 1}"):
        replace(PLAN, max_params=str(smallest - 1)).run(small(2, 4), NOWHERE)


@pytest.mark.parametrize(
    "options", [{"circuits": 2}, {"vectors": ("none",)}, {"generator": "aligned"}, {"generator": "paper"}]
)
def test_a_budget_and_a_size_contradict_each_other(options):
    with pytest.raises(OptionError, match=r"^max_params: expected neither `circuits`, `vectors` nor another"):
        PlanLayout(max_params="5000", **options).run(small(2, 4), NOWHERE)


@pytest.mark.parametrize("options", [{"layers": 0}, {"features": "magic"}, {"qubits": 2}])
def test_other_options_are_checked_beside_a_budget(options):
    (name,) = options
    with pytest.raises(OptionError, match=f"^{name}: "):
        PlanLayout(max_params="5000", **options).run(small(2, 4), NOWHERE)


@pytest.mark.parametrize("budget", ["300", "25%"])
@pytest.mark.parametrize("method", ["ia3", "prefix", "ffa"])
def test_an_adapter_that_is_no_product_has_no_budget(method, budget):
    file = Path(__file__).parent / "golden" / "adapter-spec-2" / f"{method}.json"
    spec = AdapterSpec.from_json(file.read_bytes(), file.name)
    message = f"^max_params: expected no budget, since .* LoRA and DoRA alone, found {budget}; use `circuits`"
    with pytest.raises(OptionError, match=message):
        PlanLayout(max_params=budget).run(spec, NOWHERE)
