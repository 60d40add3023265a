"""MultiMaxConfig: defaults, validation that names the field, and the round trip through JSON."""

import dataclasses
import json
import logging

import pytest

from hf_multimax import MultiMaxConfig


def test_defaults_are_the_documented_ones():
    assert MultiMaxConfig().to_dict() == {
        "normalizer": "multimax",
        "normalizer_kwargs": {},
        "order": 2,
        "affine": False,
        "attention": True,
        "output": False,
        "per_head": False,
        "init": "identity",
        "init_std": 0.02,
        "include": None,
        "exclude": None,
    }


def test_every_field_has_help():
    assert all(field.metadata["help"] for field in dataclasses.fields(MultiMaxConfig))


def test_affine_has_order_one():
    assert MultiMaxConfig(affine=True).order == 1
    assert MultiMaxConfig().replace(affine=True).order == 1
    with pytest.raises(ValueError, match=r"MultiMaxConfig\.order .*affine"):
        MultiMaxConfig(affine=True, order=2)


def test_an_unknown_name_is_a_type_error():
    with pytest.raises(TypeError, match="typo"):
        MultiMaxConfig(typo=1)
    with pytest.raises(TypeError, match="no field 'typo'; there are .*per_head"):
        MultiMaxConfig().replace(typo=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalizer", ""),
        ("normalizer", 3),
        ("normalizer_kwargs", None),
        ("normalizer_kwargs", {"a": object()}),
        ("normalizer_kwargs", {"a": float("nan")}),
        ("order", 0),
        ("order", -1),
        ("order", 2.0),
        ("order", True),
        ("order", "2"),
        ("order", 17),
        ("affine", 1),
        ("attention", None),
        ("output", "yes"),
        ("per_head", 0),
        ("init", "zeros"),
        ("init_std", 0.0),
        ("init_std", float("nan")),
        ("init_std", "a"),
        ("include", 3),
        ("include", ["a", 3]),
        ("exclude", "("),
        ("exclude", ["ok", "["]),
        ("exclude", "a{99999999999}"),
        ("exclude", "a" * 301),
    ],
)
def test_an_impossible_value_is_refused_with_the_fields_name(field, value):
    with pytest.raises(ValueError, match=rf"MultiMaxConfig\.{field}"):
        MultiMaxConfig(**{field: value})


def test_nothing_to_replace_is_refused():
    with pytest.raises(ValueError, match="attention.*output"):
        MultiMaxConfig(attention=False)


def test_choosing_layers_that_are_not_replaced_is_refused():
    with pytest.raises(ValueError, match="include"):
        MultiMaxConfig(attention=False, output=True, include="h.0")


def test_round_trip():
    config = MultiMaxConfig(order=3, per_head=True, include=["a", "b"], exclude="c", normalizer_kwargs={"x": [1, 2]})
    assert MultiMaxConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_keys_of_a_newer_version_are_kept_and_reported(caplog):
    with caplog.at_level(logging.WARNING):
        config = MultiMaxConfig.from_dict({"order": 1, "from_the_future": {"a": 1}})
    assert "from_the_future" in caplog.text
    assert config.to_dict()["from_the_future"] == {"a": 1}
    assert config.replace(order=2).to_dict()["from_the_future"] == {"a": 1}


def test_matching_names():
    config = MultiMaxConfig(include=["decoder", r"h\.[4-7]\."], exclude=r"cross")
    names = ["decoder.0", "encoder.0", "h.5.attn", "h.3.attn", "decoder.cross"]
    assert [name for name in names if config.matches(name)] == ["decoder.0", "h.5.attn"]


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "((a)+)*b",
        "((?:a|b))+c",
        "(?P<n>a*)*",
        "(?:a?){30}a{30}",
        "a?" * 30 + "a" * 30,
        ".*" * 6 + "!",
        "(?x)#[\n(a+)+$#]",
        "(?#[)(a+)+$(?#])",
        "(|)" * 16 + "Q",
        "(?:.|.)" * 18 + "$Q",
    ],
)
def test_patterns_that_could_take_forever_are_refused(pattern):
    with pytest.raises(ValueError, match="MultiMaxConfig.include.*forever"):
        MultiMaxConfig(include=pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"h\.([4-7]|11)\.attn",
        r"(encoder|decoder)\.layers\.\d+\.self_attn",
        r".*?attn",
        "(?i)H.0",
        "(?!x).*$",
        "[(+*?]x(a)",
    ],
)
def test_patterns_as_people_write_them_are_taken(pattern):
    assert MultiMaxConfig(include=pattern).patterns("include") == [pattern]


@pytest.mark.parametrize("value", [None, [], "multimax"])
def test_an_entry_that_is_no_object_is_refused(value):
    with pytest.raises(ValueError, match="multimax"):
        MultiMaxConfig.from_dict(value)
