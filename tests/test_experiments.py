"""The studies that are shipped: every table at every scale is a valid study, arms differ in what they claim to, and the fit of the scaling law finds a known one."""

import importlib.util
import itertools
import types
from pathlib import Path

import numpy as np
import pytest

from ptm import recipe, registry
from ptm.fields import ConfigError
from ptm.study import prepare, resolution

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "experiments"
TABLES = {
    "quickstart": ("",), "bert": ("tasks", "masking"), "roberta": ("masking", "formats", "batch"), "albert": ("objective", "sharing", "embedding"),
    "electra": ("arms", "tying", "generator"), "t5": ("rate", "spans", "architecture", "objective"), "xlnet": ("",), "scaling": ("",),
}  # fmt: skip
SCALES = ("full", "small", "tiny")
SPECS = [f"{EXPERIMENTS}/{file}.py:{','.join(filter(None, (table, scale)))}" for file, tables in TABLES.items() for table in tables for scale in SCALES]
SHORT = {spec: spec.rpartition("/")[2] for spec in SPECS}


@pytest.fixture(autouse=True)
def no_data(monkeypatch, tmp_path):
    """Recipes name the data; whether it is there is another matter."""
    monkeypatch.setenv("PTM_DATA", str(tmp_path / "none"))


def loaded(name: str) -> types.ModuleType:
    """A file of experiments/ as a module."""
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def resolved(spec: str, tmp_path: Path):
    return prepare(spec, workdir=tmp_path / "study", write=False)


def test_every_study_file_is_known_here():
    files = {path.stem for path in EXPERIMENTS.glob("*.py") if "def get_study" in path.read_text(encoding="utf-8")}
    assert files == set(TABLES)


@pytest.mark.parametrize("spec", SPECS, ids=SHORT.values())
def test_every_table_is_a_study_at_every_scale(spec):
    study = resolution.load(spec)
    assert len(study.seeds) >= 3 and study.orderings
    assert all(entry.source for entry in (*study.published, *study.orderings))
    assert len({(entry.arm, entry.metric) for entry in study.published}) == len(study.published)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.endswith("tiny")], ids=[name for name in SHORT.values() if name.endswith("tiny")])
def test_tiny_studies_resolve(spec, tmp_path):
    record = resolved(spec, tmp_path)
    assert len(record.runs) >= len(record.arms)
    differences = [tuple(map(str, arm.difference.items())) for arm in record.arms]
    assert len(set(differences)) == len(record.arms), "two arms are the same"


@pytest.mark.slow
@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.endswith("tiny")], ids=[name for name in SHORT.values() if not name.endswith("tiny")])
def test_full_and_small_studies_resolve(spec, tmp_path):
    resolved(spec, tmp_path)


def test_arms_of_electra_have_equal_compute():
    """Steps times the FLOPs of a step, by ptm's own count of a whole step, differ by less than a hundredth."""
    spec = f"{EXPERIMENTS}/electra.py:arms,tiny"
    study = resolution.load(spec)
    spent = {}
    for arm in study.arms:
        config = recipe.load(f"{ROOT}/{arm.recipes['pretrain'] if arm.recipes else study.stages[0].recipe}")
        made = registry.resolve(config)
        objective = made.objective
        if "objective.arm" in arm.overrides:
            objective = type(objective)(**{**vars(objective), "arm": arm.overrides["objective.arm"]})
        model = type(made.model)(**{**vars(made.model), "vocab_size": made.tokenizer.vocab_size})
        lengths = objective.lengths(made.data.length)
        heads = (objective.heads,) if made.model.name == "electra" else ()
        spent[arm.name] = arm.overrides["train.steps"] * model.forward_flops(lengths, lengths["S"], *heads)
    assert max(spent.values()) / min(spent.values()) < 1.01, spent


def test_inputs_of_t5_fill_the_encoder_whatever_is_corrupted():
    study = resolution.load(f"{EXPERIMENTS}/t5.py:rate,tiny")
    lengths = {arm.name: arm.overrides["data.length"] for arm in study.arms}
    assert list(lengths.values()) == sorted(lengths.values()) and lengths["50 %"] > 2 * lengths["15 %"]


def law(flops: float, parameters: float) -> float:
    """Hoffmann et al. 2022, equation 10, as refitted by Besiroglu et al. 2024."""
    return 1.82 + 482 / parameters**0.348 + 2085 / (flops / 6 / parameters) ** 0.366


def runs_of(isoflop, *, noise: float, at=law, sizes=(1 / 4, 1 / 2, 1, 2, 4)) -> list:
    rng = np.random.default_rng(0)
    points = [(flops, size * 0.6 * (flops / 120) ** 0.5) for flops, size in itertools.product((6e18, 6e19, 6e20, 6e21), sizes)]
    return [isoflop.Runs(c, n, c / 6 / n, [at(c, n) + noise * rng.normal() for _ in range(3)]) for c, n in points]


def test_fit_finds_the_exponents_of_a_known_law():
    isoflop = loaded("isoflop")
    exact = isoflop.fit(runs_of(isoflop, noise=0.0), draws=10)
    expected = 0.366 / (0.348 + 0.366)
    assert exact.a[0] == pytest.approx(expected, abs=0.01) and exact.a[0] + exact.b[0] == pytest.approx(1.0, abs=1e-6)
    assert exact.a[1] == pytest.approx(exact.a[2]), "without noise no draw differs"
    noisy = isoflop.fit(runs_of(isoflop, noise=0.01), draws=200)
    assert noisy.a[1] < expected < noisy.a[2] and noisy.a[2] - noisy.a[1] > 0.01


def test_fit_draws_from_several_runs_alone():
    isoflop = loaded("isoflop")
    single = [entry._replace(losses=entry.losses[:1]) for entry in runs_of(isoflop, noise=0.01)]
    with pytest.raises(ConfigError, match="under two seeds"):
        isoflop.fit(single, draws=2)


def test_draws_without_exponents_are_counted():
    """Where valleys are hardly deeper than the noise, some draws have none."""
    isoflop = loaded("isoflop")
    shallow = runs_of(isoflop, noise=0.01, at=lambda c, n: 3e-3 * np.log(n / (c / 120) ** 0.5) ** 2)
    found = isoflop.fit(shallow, draws=200)
    assert 0 < found.draws < 200


def test_fit_leaves_out_budgets_without_a_valley():
    isoflop = loaded("isoflop")

    def falling(flops: float, parameters: float) -> float:
        return -np.log(parameters) if flops == 6e18 else law(flops, parameters)

    found = isoflop.fit(runs_of(isoflop, noise=0.0, at=falling), draws=2)
    assert set(found.valleys) == {6e19, 6e20, 6e21}
    with pytest.raises(ConfigError, match="0 of 4 budgets"):
        isoflop.fit(runs_of(isoflop, noise=0.0, at=lambda c, n: -np.log(n)), draws=2)
