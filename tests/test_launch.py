"""Launchers: what they would start (goldens in data/launch), how tasks depend on each other, the command line, and manifests against the API's models."""

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import command, kubernetes, local, slurm, tpu_pod
from launch.job import Job, Resources, Task, arrays, label, ranges, require_inside, shell, trees
from ptm.fields import ConfigError

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "data/launch"


def study(python: str = "ptm") -> tuple[Task, ...]:
    """Two arms and two seeds of two stages; seed 1 of the first stage is shared by both arms."""

    def task(arm: str, seed: int, stage: str, needs: str | None = None) -> Task:
        name = f"{arm}/seed{seed}/{stage}"
        words = (python, "study", "experiments/rate.py:small", "--workdir=/runs/it's", f"--run={name}")
        return Task(name=name, command=words, stage=stage, workdir=Path("/runs/it's") / name, needs=needs)

    first = (task("15 %", 0, "pretrain"), task("50 %", 0, "pretrain"), task("15 %", 1, "pretrain"))
    parents = {("15 %", 0): first[0].name, ("50 %", 0): first[1].name, ("15 %", 1): first[2].name, ("50 %", 1): first[2].name}
    return (*first, *(task(arm, seed, stage, parents[arm, seed]) for stage in ("sst2", "mnli") for seed in (0, 1) for arm in ("15 %", "50 %")))


def described(launcher: command.Launcher, options: Any, **changes: Any) -> Job:
    resources = Resources(**{key.name: vars(options)[key.name] for key in dataclasses.fields(Resources)})
    return Job(**{"name": "rate", "tasks": study(), "workdir": Path("/runs/it's"), "folder": Path("/home/me/check out"), "resources": resources} | changes)


KUBERNETES = {"image": "registry.example/ptm:1", "claim": "runs", "folder": "/ptm"}
SHOWN = {
    "local": (local, local.Options(cores=2, devices=1)),
    "slurm": (slurm, slurm.Options(devices=8, cores=32, memory=200, time=240, parallel=2, partition="gpu", account="research", setup="module load cuda")),
    "slurm_hosts": (slurm, slurm.Options(hosts=4, devices=4, tasks_per_host=4, cores=64)),
    "kubernetes_gpu": (
        kubernetes,
        kubernetes.Options(**KUBERNETES, hosts=2, devices=8, memory=400, cores=64, accelerator="nvidia-h100-80gb", time=600, queue="research"),
    ),
    "kubernetes_tpu": (kubernetes, kubernetes.Options(**KUBERNETES, hosts=4, devices=4, accelerator="tpu-v5-lite-podslice", topology="4x4", namespace="ml")),
    "kubernetes_cpu": (kubernetes, kubernetes.Options(**KUBERNETES, cores=2, account="runner")),
    "tpu_pod": (
        tpu_pod,
        tpu_pod.Options(zone="us-central2-b", project="research", type="v5litepod-16", version="v2-alpha-tpuv5-lite", slices=2, folder="ptm", setup="git pull"),
    ),
}


def shown(name: str) -> str:
    module, options = SHOWN[name]
    tasks = {"local": study(), "slurm": study(), "kubernetes_gpu": trees(study())[2][:3], "tpu_pod": study()[:4:3]}
    return module.show(described(module.LAUNCHER, options, tasks=tuple(tasks.get(name, study()[:1]))), options) + "\n"


@pytest.fixture
def machine(monkeypatch) -> None:
    monkeypatch.setattr(local, "machine", lambda: ([0, 1, 2, 3, 6, 7], ["0", "1"]))


@pytest.mark.parametrize("name", SHOWN)
def test_golden(name, machine):
    """Remade by `PYTHONPATH=. python tests/test_launch.py`."""
    assert shown(name) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in SHOWN if not name.startswith("kubernetes")])
def test_scripts_are_shell(name, machine):
    subprocess.run(["bash", "-n"], input=shown(name), text=True, check=True)


# Names and arguments.


@pytest.mark.parametrize("name", ["", "/x", "a/../b", "..", "a//b", "a/", ".", "a\nb", "a\0b", "a/\x1b[2J"])
def test_names_stay_inside(name):
    with pytest.raises(ConfigError, match="cannot be the name of a task"):
        require_inside(name)


def test_jobs_are_checked():
    one = Task(name="a", command=("x",), stage="s", workdir=Path("/w"))
    place = {"name": "j", "workdir": Path("/w"), "folder": Path("/f")}
    for tasks, told in (
        ((one, one), "two tasks"),
        ((dataclasses.replace(one, needs="b"),), "is no task before it"),
        ((dataclasses.replace(one, name="../x"),), "cannot be"),
    ):
        with pytest.raises(ConfigError, match=told):
            Job(tasks=tasks, **place)
    with pytest.raises(ConfigError, match="control characters"):
        Job(tasks=(), **place | {"workdir": Path("/a\nb")})


def test_labels():
    assert label("15 % / Seed 0", length=20) == "x15-seed-0"
    assert label("a" * 99, length=10) == "a" * 10 and label("", length=5) == "x"
    assert label("b", unique=("x",)) != label("b", unique=("y",)) and len(label("c" * 99, length=30, unique=("z",))) == 30
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8" and ranges([]) == ""


# What depends on what.


def test_a_task_has_the_number_of_the_one_that_it_needs():
    tasks = study()
    made = arrays(tasks, largest=2)
    assert sorted(task.name for array in made for task in array.tasks.values()) == sorted(task.name for task in tasks)
    for array in made:
        assert len({task.stage for task in array.tasks.values()}) == 1 and max(array.tasks) < 2
        for number, task in array.tasks.items():
            assert (array.after is None) == (task.needs is None)
            assert array.after is None or array.after.tasks[number].name == task.needs
    assert len({array.name for array in made}) == len(made) and [array.name for array in made if array.after is None] == ["pretrain", "pretrain-2"]


def test_trees():
    found = trees(study())
    assert [tree[0].needs for tree in found] == [None] * 3 and [len(tree) for tree in found] == [3, 3, 5]
    assert all(task.needs in [before.name for before in tree[:n]] for tree in found for n, task in enumerate(tree) if n)


# Cores and devices.


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [((0, 1, 2, 3, 6, 7), "")]),
        ({"parallel": 3}, [((0, 1), ""), ((2, 3), ""), ((6, 7), "")]),
        ({"cores": 2, "parallel": 2}, [((0, 1), ""), ((2, 3), "")]),
        ({"cores": 2}, [((0, 1), ""), ((2, 3), ""), ((6, 7), "")]),
    ],
)
def test_cores_are_divided(given, expected):
    places = local.slots(local.Options(**given), tasks=9, cores=[0, 1, 2, 3, 6, 7], devices=[])
    assert [(place.cores, place.env.get(local.DEVICES, "")) for place in places] == expected


@pytest.mark.parametrize(
    ("given", "tasks", "expected"),
    [
        ({}, 9, ["0", "1", "2", "3"]),
        ({"devices": 2}, 9, ["0,1", "2,3"]),
        ({"cores": 1}, 9, ["0", "1", "2", "3"]),
        ({"parallel": 2}, 9, ["0,1", "2,3"]),
        ({}, 1, ["0,1,2,3"]),
        ({"devices": 0, "parallel": 2}, 9, ["", ""]),
    ],
)
def test_devices_are_divided(given, tasks, expected):
    places = local.slots(local.Options(**given), tasks=tasks, cores=list(range(8)), devices=["0", "1", "2", "3"])
    assert [place.env[local.DEVICES] for place in places] == expected
    assert len({core for place in places for core in place.cores}) == sum(len(place.cores) for place in places)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"parallel": 9, "devices": 0}, "--parallel=9 tasks of 1 cores each need 9; there are 4"),
        ({"cores": 5}, "--cores=5; this process may use 4"),
        ({"devices": 3}, "--devices=3; this machine has 2"),
        ({"cores": 2, "parallel": 3, "devices": 0}, "--parallel=3 tasks of 2 cores each need 6"),
        ({"devices": 1, "parallel": 3}, "--parallel=3 tasks of 1 devices each need 3"),
        ({"parallel": 3}, "--parallel=3; this machine has 2 devices"),
    ],
)
def test_a_machine_that_is_too_small(given, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        local.slots(local.Options(**given), tasks=9, cores=[0, 1, 2, 3], devices=["0", "1"])


# The command line.

RIGHT = {
    "local": (), "slurm": (), "kubernetes": ("--image=x", "--claim=runs"),
    "tpu_pod": ("--zone=z", "--type=v4-8", "--version=v"),
}  # fmt: skip
CONFIG = ("--config=configs/quickstart.py:tiny", "--workdir=/runs/x")
LAUNCHERS = {"local": local, "slurm": slurm, "kubernetes": kubernetes, "tpu_pod": tpu_pod}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_dry_run_of_one_run(name, monkeypatch, capsys):
    """The command as `ptm` takes it, with overrides; nothing is made."""
    monkeypatch.setattr(command, "_require_config", lambda *_: None)
    words = [*CONFIG, *RIGHT[name], "--config.train.steps=7", "--allow_change=init", "--ptm=ptm", "--dry_run"]
    assert command.main(LAUNCHERS[name].LAUNCHER, words) == 0
    out = capsys.readouterr().out
    expected = ["ptm", "train", CONFIG[0], CONFIG[1], "--config.train.steps=7", "--allow_change=init"]
    found = (
        next(iter(yaml.safe_load_all(out)))["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
        if name == "kubernetes"
        else None
    )
    assert found == expected or shell(expected) in out.replace("'\"'\"'", "'")
    assert not Path("/runs/x").exists()


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("local", (*CONFIG, "--cors=2"), "unknown argument '--cors=2'; allowed: --config"),
        ("local", (*CONFIG, "--cors=2"), "Did you mean '--cores'?"),
        ("local", (*CONFIG, "--hosts=2"), "--hosts=2; launch.local works on this machine"),
        ("local", (*CONFIG, "--time=20"), "launch.local sets no limit of time"),
        ("local", (*CONFIG, "--parallel=0"), "parallel=0 is out of range; allowed: 1 or more"),
        ("local", (*CONFIG, "--parallel=two"), "--parallel=two cannot be read; allowed: int or None"),
        ("local", (*CONFIG, "--config.seed"), "--config.seed has no value"),
        ("local", (*CONFIG, "--ptm="), "--ptm= is no command"),
        ("local", (*CONFIG, "--ptm='"), "is no command"),
        ("local", ("--workdir=/x",), "got neither"),
        ("local", ("a.py", *CONFIG), "got both, a.py and --config=configs/quickstart.py:tiny"),
        ("local", ("--config=a.py",), "--workdir=DIR is missing"),
        ("local", (*CONFIG, "--same_code"), "--same_code goes with a study alone"),
        ("local", ("a.py", "--workdir=/x", "--seeds=3"), "--seeds goes with --config alone"),
        ("local", (*CONFIG, "--site=/nowhere"), "--site=/nowhere cannot be read"),
        ("slurm", (*CONFIG, "--time=3"), "--time=3 minutes leave nothing before the signal"),
        ("slurm", (*CONFIG, "--devices=2", "--tasks_per_host=4"), "cannot share --devices=2"),
        ("slurm", (*CONFIG, "--cores=2", "--tasks_per_host=4"), "--cores=2 are fewer"),
        ("slurm", (*CONFIG, "--setup=a\nb"), "give one line"),
        ("slurm", (*CONFIG, "--status", "--cancel"), "--status and --cancel are two things"),
        ("kubernetes", (*CONFIG, "--claim=a"), "--image=NAME is missing"),
        ("kubernetes", (*CONFIG, "--image=x"), "--claim=NAME is missing"),
        ("kubernetes", (*CONFIG, *RIGHT["kubernetes"], "--devices=8"), "--devices=8 needs --accelerator"),
        ("kubernetes", (*CONFIG, *RIGHT["kubernetes"], "--accelerator=tpu-v5p-slice"), "a slice of TPUs is named by both"),
        (
            "kubernetes",
            (*CONFIG, *RIGHT["kubernetes"], "--accelerator=tpu-v5p-slice", "--topology=2x2x2", "--devices=4"),
            "has 8 chips, but --hosts=1 of --devices=4 each have 4",
        ),
        ("kubernetes", (*CONFIG, *RIGHT["kubernetes"], "--accelerator=tpu-v5p-slice", "--topology=big"), "is of no form AxB"),
        ("kubernetes", (*CONFIG, *RIGHT["kubernetes"], "--queue=Big Queue"), "is no name of Kubernetes"),
        ("kubernetes", (CONFIG[0], "--workdir=/tmp/x", *RIGHT["kubernetes"]), "is not below --mount=/runs"),
        ("kubernetes", (CONFIG[0], "--workdir=x", *RIGHT["kubernetes"]), "give its path from the root on"),
        ("tpu_pod", (*CONFIG, "--type=v4-8"), "--zone=us-central2-b is missing"),
        ("tpu_pod", (*CONFIG, *RIGHT["tpu_pod"], "--type=v4 8;x"), "is no name of Cloud TPUs"),
        ("tpu_pod", (*CONFIG, *RIGHT["tpu_pod"], "--hosts=4"), "the type of a slice says what it has"),
        ("tpu_pod", (*CONFIG, *RIGHT["tpu_pod"], "--capacity=lots"), "capacity=lots; allowed: spot, guaranteed, best-effort"),
    ],
)
def test_wrong_usage_is_told_in_one_line(name, words, told, monkeypatch, capsys):
    monkeypatch.setattr(command, "_require_config", lambda *_: None)
    assert command.main(LAUNCHERS[name].LAUNCHER, [*words, "--dry_run"]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1 and err.startswith(f"launch.{name}: "), err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[slurm]\npartion = x", "unknown key 'partion'"),
        ("[slrm]\nx = 1", "unknown section [slrm]"),
        ("x = 1", "no section headers"),
        ("[slurm]\ngrace = soon", "--grace=soon cannot be read"),
    ],
)
def test_a_wrong_site(text, told, tmp_path, capsys):
    (tmp_path / "site.ini").write_text(text)
    assert command.main(slurm.LAUNCHER, [*CONFIG, f"--site={tmp_path / 'site.ini'}"]) == 2
    assert told in capsys.readouterr().err


def test_flags_override_the_site(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_require_config", lambda *_: None)
    (tmp_path / "site.ini").write_text("[slurm]\npartition = 100%\ntime = 60\n[local]\ncores = 1\n")
    assert command.main(slurm.LAUNCHER, [*CONFIG, f"--site={tmp_path / 'site.ini'}", "--time=90", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "--partition=100%" in out and "--time=90" in out and "cpus-per-task" not in out


def test_a_config_that_is_refused_is_not_submitted(capsys):
    assert command.main(slurm.LAUNCHER, ["--config=configs/quickstart.py:nothing", "--workdir=/runs/x", "--dry_run"]) == 2
    assert "launch.slurm: unknown word 'nothing'" in capsys.readouterr().err


def test_where_there_is_no_cluster(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "_require_config", lambda *_: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, told in (("slurm", "there is no `sbatch`"), ("kubernetes", "there is no `kubectl`"), ("tpu_pod", "there is no `gcloud`")):
        workdir = f"--workdir={tmp_path}" if name != "kubernetes" else "--workdir=/runs/x"
        assert command.main(LAUNCHERS[name].LAUNCHER, [CONFIG[0], workdir, *RIGHT[name]]) == 2
        err = capsys.readouterr().err
        assert told in err and err.count("\n") == 1


STUDY = """
from ptm.study import Arm, Metric, Stage, Study


def get_study(argument: str = "") -> Study:
    return Study(
        claim="A higher rate is better.", paper="None, section 0", base="low", differs=("second:optimizer.*",), seeds=(0, 1),
        stages=(Stage("first", recipe="configs/quickstart.py:tiny"), Stage("second", recipe="configs/quickstart.py:tiny", after="first")),
        arms=(Arm("low", {}), Arm("high", {"second:optimizer.learning_rate": 0.02})), metrics=(Metric("second:validation/loss", higher=False, label="loss"),),
    )
"""


def test_dry_run_of_a_study(tmp_path, monkeypatch, capsys):
    """A task for each of its runs, the shared ones once; nothing is made. A study that is refused is told in one line."""
    (tmp_path / "study.py").write_text(STUDY)
    monkeypatch.chdir(ROOT)
    words = [f"{tmp_path}/study.py", f"--workdir={tmp_path / 'runs'}", "--ptm=ptm", "--same_code", "--config.first.train.steps=10", "--dry_run"]
    assert command.main(slurm.LAUNCHER, words) == 0
    out = capsys.readouterr().out
    found = [shlex.split(line.partition("words=(")[2].removesuffix(") ;;")) for line in out.splitlines() if "words=(" in line]
    common = ["ptm", "study", f"{tmp_path}/study.py", f"--workdir={tmp_path / 'runs'}", "--config.first.train.steps=10", "--same_code"]
    names = [f"{arm}/seed{seed}/{stage}" for stage, arms in (("first", ["low"]), ("second", ["low"]), ("second", ["high"])) for arm in arms for seed in (0, 1)]
    assert found == [[*common, f"--run={name}"] for name in names]
    assert out.count("--dependency=aftercorr:ID_OF_01-first") == 2 and not (tmp_path / "runs").exists()
    (tmp_path / "study.py").write_text(STUDY.replace("optimizer.learning_rate", "optimizer.learning_rat"))
    assert command.main(slurm.LAUNCHER, words) == 2
    err = capsys.readouterr().err
    assert "learning_rat" in err and err.count("\n") == 1


# Kubernetes.


@pytest.mark.parametrize("name", [name for name in SHOWN if name.startswith("kubernetes")])
def test_manifests_follow_the_schemas(name):
    """Types and required keys by the models that are generated of the API's OpenAPI description; no key is unknown; words are among those it lists."""
    for manifest in yaml.safe_load_all(shown(name)):
        assert not faults(manifest)


def faults(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs the extra test: pip install -e '.[test]'")
    try:
        model = models.JobsetV1alpha2JobSet.from_dict(manifest)
    except ValueError as error:
        return [str(error)]
    return unlisted(model) + (["a key is unknown"] if without_empty(model.to_dict()) != manifest else [])


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("failurePolicy", "rules", 0, "action"), "Fail", "action=Fail: ['FailJobSet'"),
        (("failurePolicy", "rules", 0, "name"), None, "a key is unknown"),
        (("replicatedJobs", 0, "template", "spec", "completions"), "4", "completions"),
        (("replicatedJobs", 0, "template", "spec", "backoffLimits"), 0, "a key is unknown"),
        (("replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 1, "action"), "Restart", "action"),
        (("replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 1, "onExitCodes", "values"), ["75"], "values"),
        (("replicatedJobs", 0, "template", "spec", "template", "spec", "restartPolicy"), "Sometimes", "restartPolicy"),
        (("replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "comand"), ["x"], "a key is unknown"),
    ],
)
def test_a_wrong_manifest_is_found(path, value, told):
    manifest = next(iter(yaml.safe_load_all(shown("kubernetes_tpu"))))
    place = manifest["spec"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert any(told in fault for fault in faults(manifest)), faults(manifest)


def without_empty(value: Any) -> Any:
    """A manifest without keys that hold nothing, which the models add."""
    if isinstance(value, dict):
        return {key: inner for key, item in value.items() if (inner := without_empty(item)) not in ({}, None)}
    return [without_empty(item) for item in value] if isinstance(value, list) else value


def unlisted(model: Any) -> list[str]:
    """Words of a model that are not among those that the description of their key lists; where the API itself lists them, the models look at them."""
    found = []
    for name, key in type(model).model_fields.items():
        value, listed = vars(model)[name], re.findall(r"Valid values are ([\w, ]+)\.", key.description or "")
        if isinstance(value, str) and listed and value not in listed[0].split(", "):
            found.append(f"{name}={value}: {listed[0].split(', ')}")
        for inner in value if isinstance(value, list) else [value]:
            found += unlisted(inner) if hasattr(type(inner), "model_fields") else []
    return found


@pytest.mark.parametrize("name", [name for name in SHOWN if name.startswith("kubernetes")])
def test_what_the_api_server_checks_besides(name):
    """Names, lengths, and what goes together; of the documentation of Job and JobSet."""
    found = list(yaml.safe_load_all(shown(name)))
    assert len({manifest["metadata"]["name"] for manifest in found}) == len(found)
    for manifest in found:
        jobset, jobs = manifest["metadata"]["name"], manifest["spec"]["replicatedJobs"]
        before: list[str] = []
        for job in jobs:
            spec = job["template"]["spec"]
            host = f"{jobset}-{job['name']}-0-{spec['completions'] - 1}"
            assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", host) and len(host) + len("-xxxxx") <= 63
            assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] and spec["template"]["spec"]["restartPolicy"] == "Never"
            assert [entry["name"] in before for entry in job.get("dependsOn", [])] == ([True] if before else [])
            before.append(job["name"])
            rules = spec["podFailurePolicy"]["rules"]
            assert [(rule["action"], rule["onExitCodes"]["operator"], rule["onExitCodes"]["values"]) for rule in rules[1:]] == [
                ("Count", "In", [75]),
                ("FailJob", "NotIn", [75]),
            ]
            containers = spec["template"]["spec"]["containers"]
            assert all(rule["onExitCodes"]["containerName"] == containers[0]["name"] for rule in rules[1:]) and spec["backoffLimit"] == 0
            limits = containers[0].get("resources", {}).get("limits", {})
            assert all(limits[key] == containers[0]["resources"]["requests"][key] for key in limits)
        labels = {**manifest["metadata"]["labels"], **jobs[0]["template"]["spec"]["template"]["metadata"]["labels"]}
        assert all(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", value) for value in labels.values())


def test_no_word_is_a_variable_of_kubernetes():
    given = ("ptm", "$(HOME)", "$$(x)", "text:$PTM_DATA/a b", "$$", "5$", "$()")
    task = Task(name="a", command=given, stage="s", workdir=Path("/runs/x"))
    job = Job(name="j", tasks=(task,), workdir=Path("/runs/x"), folder=Path("/f"))
    manifest = kubernetes.manifests(job, kubernetes.Options(**KUBERNETES))[0]
    words = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    # As k8s.io/kubernetes reads them (third_party/forked/golang/expansion): $$ is one $, $(NAME) a variable, which is empty here.
    assert tuple(re.sub(r"\$\$|\$\([^)]*\)", lambda found: "$" if found[0] == "$$" else "", word) for word in words) == given


if __name__ == "__main__":
    local.machine = lambda: ([0, 1, 2, 3, 6, 7], ["0", "1"])
    GOLDEN.mkdir(exist_ok=True)
    for golden in SHOWN:
        (GOLDEN / f"{golden}.txt").write_text(shown(golden), encoding="utf-8")
