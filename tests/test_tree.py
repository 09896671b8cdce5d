"""Paths, patterns, groups, tables and diffs of parameter trees."""

import jax
import numpy as np
import pytest

from ptm import tree
from ptm.fields import ConfigError


def example() -> dict:
    return {
        "token_embed": {"embedding": np.zeros((7, 4))},
        "decoder": {
            "layers": {"mlp": {"wi": {"kernel": np.zeros((3, 4, 8)), "bias": np.zeros((3, 8))}}, "mlp_norm": {"scale": np.zeros((3, 4))}},
            "final_norm": {"scale": np.zeros(4)},
        },
        "lm_head": {"kernel": np.zeros((4, 7))},
    }


PATHS = [
    "decoder/final_norm/scale", "decoder/layers/mlp/wi/bias", "decoder/layers/mlp/wi/kernel", "decoder/layers/mlp_norm/scale",
    "lm_head/kernel", "token_embed/embedding",
]  # fmt: skip


def test_paths_are_in_the_order_of_jax_and_come_back():
    flat = tree.paths(example())
    assert list(flat) == PATHS
    assert all(a is b or np.array_equal(a, b) for a, b in zip(flat.values(), jax.tree.leaves(example()), strict=True))
    assert jax.tree.structure(tree.unflatten(flat)) == jax.tree.structure(example())
    assert list(tree.paths({"a-b": {"x": 1}, "a": {"x": 2}})) == ["a/x", "a-b/x"]


def test_a_part_of_the_paths_makes_a_smaller_tree():
    flat = tree.paths(example())
    assert tree.unflatten({path: flat[path] for path in PATHS[:1]}).keys() == {"decoder"}


def test_a_key_with_a_slash_is_refused():
    with pytest.raises(ConfigError, match="'a/b' is no component of a parameter's path"):
        tree.paths({"a/b": 1})


def test_map_paths_gives_path_and_leaves():
    doubled = tree.map_paths(lambda path, a, b: (path, a + b), {"x": {"y": 1}, "z": 2}, {"x": {"y": 10}, "z": 20})
    assert doubled == {"x": {"y": ("x/y", 11)}, "z": ("z", 22)}


def test_match_needs_the_whole_path():
    assert [path for path, hit in tree.match((".*/scale", "lm_head/.*"), PATHS, what="p").items() if hit] == [PATHS[0], PATHS[3], PATHS[4]]
    assert not any(tree.match(("scale",), PATHS, what="p", must_match=False).values())
    assert not any(tree.match((), PATHS, what="p").values())


def test_a_pattern_that_matches_nothing_names_the_nearest_path():
    with pytest.raises(ConfigError, match=r"optimizer.freeze: '.*/mlp/wi/kernle' matches none of the 6 .*decoder/layers/mlp/wi/kernel"):
        tree.match((".*/mlp/wi/kernle",), PATHS, what="optimizer.freeze")
    with pytest.raises(ConfigError, match=r"whole path; '\.\*mlp\.\*' would match 3"):
        tree.match(("mlp",), PATHS, what="p")
    with pytest.raises(ConfigError, match="not a regular expression"):
        tree.match(("(",), PATHS, what="p", must_match=False)


def test_groups():
    assert list(dict.fromkeys(map(tree.group, PATHS))) == [
        "decoder/final_norm", "decoder/layers/mlp", "decoder/layers/mlp_norm", "lm_head", "token_embed",
    ]  # fmt: skip
    assert tree.group("encoder/relative_bias/embedding") == "encoder/relative_bias"
    assert tree.group("bias") == "bias"


def test_table_has_columns_and_the_total():
    text = tree.table(example(), columns={"decay": {"lm_head/kernel": "yes"}})
    lines = text.splitlines()
    assert lines[0].split() == ["parameter", "shape", "size", "decay"]
    assert lines[5].split() == ["lm_head/kernel", "4x7", "28", "yes"]
    assert lines[-1].split() == ["total", "6", "arrays", "192"]
    assert tree.size(example()) == 192


def test_diff_names_missing_extra_and_shapes():
    assert tree.diff(example(), example()) == ""
    other = example()
    other["new"] = other.pop("lm_head")
    other["token_embed"]["embedding"] = np.zeros((8, 4))
    assert tree.diff(example(), other).splitlines() == [
        "missing   lm_head/kernel (4, 7)", "extra     new/kernel (4, 7)", "shape     token_embed/embedding expected (7, 4), got (8, 4)",
    ]  # fmt: skip
