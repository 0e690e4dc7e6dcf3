import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpa.errors import OptionError
from qpa.generators.size_search import Sized, choose_size, parse_max_params, sizes_around
from qpa.generators.spectral import SPECTRAL
from qpa.passes.plan_layout import PlanLayout
from tests.small_specs import NOWHERE, small_spec, spec_of


@functools.cache
def small(n_layers, rank):
    return small_spec(n_layers, rank)


@functools.cache
def all_plans(n_layers, rank):
    spec = small(n_layers, rank)
    return [Sized(plan, trained(plan, spec)) for plan in SPECTRAL.sizes(PlanLayout(), spec)]


def trained(plan, spec):
    return plan.run(spec, NOWHERE).account.n_generator


SHAPES = st.tuples(st.integers(1, 5), st.integers(2, 6))


@given(SHAPES, st.integers(0, 4000))
@settings(max_examples=60, deadline=None)
def test_the_largest_plan_that_fits_is_chosen(shape, above):
    spec, plans = small(*shape), all_plans(*shape)
    budget = plans[0].n_trained + above
    chosen = choose_size(sizes_around(PlanLayout(), spec, budget), budget)
    assert chosen.n_trained == max(sized.n_trained for sized in plans if sized.n_trained <= budget)
    assert trained(PlanLayout(max_params=str(budget)), spec) == chosen.n_trained
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
    assert trained(PlanLayout(max_params=str(smallest)), small(2, 4)) == smallest
    with pytest.raises(OptionError, match=f"^max_params: expected at least {smallest}, found {smallest - 1}"):
        PlanLayout(max_params=str(smallest - 1)).run(small(2, 4), NOWHERE)


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
