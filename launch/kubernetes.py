"""`python -m launch.kubernetes`: runs as JobSets on node pools of GPUs or TPUs: one JobSet for the runs that depend on each other, one replicated job a run.

Pods of a run end together. Exit code 75, or a host that is taken away, ends the job as one that may be tried again, and all pods of the JobSet are made anew:
runs that are finished end at once, the others go on. Any other exit code fails the JobSet.
"""

import dataclasses
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from launch import command
from launch.job import FINISHED, INTERRUPTED, Job, Task, label, shell, trees
from ptm.fields import ConfigError, field
from ptm.processes import VARIABLES

LABEL = "ptm-launch"
PORT = 1234
CONTAINER = "ptm"
TPU, GPU = "google.com/tpu", "nvidia.com/gpu"
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Options):
    """What else can be said to this launcher."""

    ptm: str = field("ptm", doc="How `ptm` is started in the container: a word, or several as a shell reads them.")
    image: str = field("", doc="Image of the containers, with ptm, the recipes and the study in it.")
    folder: str = field("", doc="Where the checkout is in the image, from which recipes and studies are named; empty: the image's own working directory.")
    namespace: str = field("", doc="Namespace; empty: that of kubectl's context.")
    accelerator: str = field("", doc="Kind of the nodes' accelerators as their labels have it: tpu-v5-lite-podslice, nvidia-h100-80gb; empty: any node.")
    topology: str = field("", doc="Of TPUs, the slice: 2x4 or 2x2x4; its chips are hosts x devices.")
    claim: str = field("", doc="Persistent volume claim, which all pods may write, that holds the workdir.")
    mount: str = field("/runs", doc="Where the claim is mounted.")
    account: str = field("", doc="Service account of the pods.")
    queue: str = field("", doc="Local queue of Kueue, which lets so many start as there is room for; empty: no Kueue.")
    grace: int = field(120, low=1, unit="seconds", doc="How long a pod that is asked to end has to save.")
    restarts: int = field(10, low=0, doc="Times that pods are made anew after other ends than 75 and lost hosts, such as a time limit.")

    def check(self, where: str) -> None:
        super().check(where)
        tpu = self.accelerator.startswith("tpu")
        if not self.image:
            raise ConfigError("--image=NAME is missing, the image of the containers; launch/site.ini can hold it.")
        if not self.claim:
            raise ConfigError("--claim=NAME is missing, the persistent volume claim that holds the workdir: what a pod writes elsewhere is lost with it.")
        if self.devices and not self.accelerator:
            raise ConfigError(f"--devices={self.devices} needs --accelerator=KIND, such as nvidia-h100-80gb or tpu-v5-lite-podslice.")
        if tpu != bool(self.topology):
            given = f"--accelerator={self.accelerator} --topology={self.topology}"
            raise ConfigError(f"{given}: a slice of TPUs is named by both, such as tpu-v5-lite-podslice and 2x4, GPUs by the first alone.")
        if tpu and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", self.topology):
            raise ConfigError(f"--topology={self.topology} is of no form AxB or AxBxC, such as 2x4.")
        devices = self.devices or 0
        if tpu and (chips := math.prod(map(int, self.topology.split("x")))) != self.hosts * devices:
            raise ConfigError(
                f"--topology={self.topology} has {chips} chips, but --hosts={self.hosts} of --devices={devices} each have {self.hosts * devices}."
            )
        for name in ("namespace", "claim", "queue", "account"):
            if vars(self)[name] and not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", vars(self)[name]):
                raise ConfigError(f"--{name}={vars(self)[name]} is no name of Kubernetes: lower case letters, digits, '-' and '.'.")


def manifests(job: Job, options: Options) -> list[dict[str, Any]]:
    """The JobSets of a job. Raises ConfigError for a workdir that is not on the claim."""
    if not job.workdir.is_relative_to(options.mount):
        raise ConfigError(f"--workdir={job.workdir} is not below --mount={options.mount}, the claim {options.claim}: it would be lost with the pod.")
    return [_jobset(job, options, tree) for tree in trees(job.tasks)]


def _jobset(job: Job, options: Options, tree: Sequence[Task]) -> dict[str, Any]:
    name = label(job.name, length=30, unique=(str(job.workdir), tree[0].name))
    names = {task.name: f"{label(task.stage, length=14)}-{n}" for n, task in enumerate(tree)}  # with them a pod's name stays below 63 characters
    slices = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"} if options.topology and options.hosts > 1 else {}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            **({"namespace": options.namespace} if options.namespace else {}),
            "labels": {LABEL: _label(job), **({"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {})},
            "annotations": {"ptm/workdir": str(job.workdir), **{f"ptm/{names[task.name]}": task.name for task in tree}, **slices},
        },
        "spec": {
            "network": {"enableDNSHostnames": True},
            "successPolicy": {"operator": "All"},
            "failurePolicy": {
                "maxRestarts": options.restarts,
                "rules": [
                    {"name": "failed", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                    {"name": "interrupted", "action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["BackoffLimitExceeded"]},
                ],
            },
            "replicatedJobs": [
                {
                    "name": names[task.name],
                    "replicas": 1,
                    **({"dependsOn": [{"name": names[task.needs], "status": "Complete"}]} if task.needs is not None else {}),
                    "template": {"spec": _job_spec(job, options, task, f"{name}-{names[task.name]}-0-0.{name}")},
                }
                for task in tree
            ],
        },
    }


def _job_spec(job: Job, options: Options, task: Task, first: str) -> dict[str, Any]:
    """A run: a pod on each host, `first` being the address of the one of process 0."""
    return {
        "completionMode": "Indexed",
        "completions": options.hosts,
        "parallelism": options.hosts,
        "backoffLimit": 0,  # one pod that is lost ends the job: the others would wait for it
        **({"activeDeadlineSeconds": 60 * options.time} if options.time else {}),
        "podFailurePolicy": {
            "rules": [
                {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "Count", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [INTERRUPTED]}},
                {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "NotIn", "values": [INTERRUPTED]}},
            ]
        },
        "template": {"metadata": {"labels": {LABEL: _label(job)}}, "spec": _pod_spec(options, task, first)},
    }


def _pod_spec(options: Options, task: Task, first: str) -> dict[str, Any]:
    tpu = bool(options.topology)
    selector = {}
    if tpu:
        selector = {"cloud.google.com/gke-tpu-accelerator": options.accelerator, "cloud.google.com/gke-tpu-topology": options.topology}
    elif options.accelerator:
        selector = {"cloud.google.com/gke-accelerator": options.accelerator}
    limits: dict[str, str] = {TPU if tpu else GPU: str(options.devices)} if options.devices else {}
    limits |= {"memory": f"{options.memory}Gi"} if options.memory else {}
    requests = limits | ({"cpu": str(options.cores)} if options.cores else {})
    resources = {name: values for name, values in (("limits", limits), ("requests", requests)) if values}
    container = {
        "name": CONTAINER,
        "image": options.image,
        "command": [word.replace("$", "$$") for word in task.command],  # Kubernetes reads $$ as $, and $(NAME) as a variable
        **({"workingDir": options.folder} if options.folder else {}),
        **({"env": place} if (place := _place(options, first)) else {}),
        **({"ports": [{"containerPort": PORT, "protocol": "TCP"}]} if options.hosts > 1 and not tpu else {}),
        **({"resources": resources} if resources else {}),
        "volumeMounts": [{"name": "runs", "mountPath": options.mount}],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace,
        **({"serviceAccountName": options.account} if options.account else {}),
        **({"nodeSelector": selector} if selector else {}),
        **({"tolerations": [{"key": TPU if tpu else GPU, "operator": "Exists", "effect": "NoSchedule"}]} if options.devices else {}),
        "containers": [container],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}}],
    }


def _place(options: Options, first: str) -> list[dict[str, Any]]:
    """What tells a pod which of how many processes it is. A slice of TPUs tells that itself."""
    coordinator, processes, process = VARIABLES["coordinator"], VARIABLES["processes"], VARIABLES["process"]
    if options.hosts == 1:
        return [{"name": processes, "value": "1"}]
    if options.topology:
        return []
    return [
        {"name": coordinator, "value": f"{first}:{PORT}"},
        {"name": processes, "value": str(options.hosts)},
        {"name": process, "valueFrom": {"fieldRef": {"fieldPath": INDEX}}},
    ]


def _label(job: Job) -> str:
    """The value of the label that all that was started for a workdir has."""
    return label(job.name, length=40, unique=(str(job.workdir),))


def _kubectl(options: Options, *words: str) -> list[str]:
    return ["kubectl", *([f"--namespace={options.namespace}"] if options.namespace else []), *words]


def _written(job: Job, options: Options) -> str:
    return yaml.safe_dump_all(manifests(job, options), sort_keys=False, width=160)


def show(job: Job, options: Options) -> str:
    """The command that would be given, and the manifests."""
    return f"# {shell(_kubectl(options, 'apply', '-f', '-'))}\n{_written(job, options)}".rstrip()


def _call(words: Sequence[str], text: str | None = None) -> int:
    if shutil.which(words[0]) is None:
        raise ConfigError(f"there is no `{words[0]}` on this machine; install it, or write the manifests with --dry_run and apply them where it is.")
    return subprocess.run(words, input=text, text=True, check=False).returncode


def start(job: Job, options: Options) -> int:
    """Applies the manifests: what is there already stays; returns the exit code."""
    return _call(_kubectl(options, "apply", "-f", "-"), _written(job, options)) if job.tasks else FINISHED


def _action(*words: str) -> Any:
    def act(job: Job, options: Options, dry_run: bool) -> int:
        line = _kubectl(options, *words, f"--selector={LABEL}={_label(job)}")
        if not dry_run:
            return _call(line)
        print(shell(line), flush=True)
        return FINISHED

    return act


LAUNCHER = command.Launcher(
    "kubernetes", Options, start, show, shared=False, actions={"status": _action("get", "jobsets,pods"), "cancel": _action("delete", "jobsets")}
)

if __name__ == "__main__":
    sys.exit(command.main(LAUNCHER))
