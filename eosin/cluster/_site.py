"""What a user says of the machines: a YAML file about the site, and nothing about the work."""

import re
import shlex
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from eosin.errors import MissingPackageError
from eosin.options import Options, merge, read_yaml

if TYPE_CHECKING:
    from parsl.executors import HighThroughputExecutor

WALLTIME = r"^\d{1,3}:[0-5]\d:[0-5]\d$"
SECRET = re.compile(r"(?i)\b(\w*(?:token|passw|secret|api_?key|credential)\w*)=[\"']?[^\"'$`\s]")
"""A variable that is called after a secret, with a value that is not read from elsewhere."""
DRAIN_SHARE, DRAIN_MOST_S = 0.1, 900
HEARTBEAT_S, LOST_S = 10, 40
FEW_CORES = 1e-3
"""Cores that Parsl believes a worker needs, so that it starts as many as it is asked for."""


class Site(Options):
    """A cluster, or a workstation, and what one job on it gets.

    Attributes
    ----------
    provider : str
        ``slurm``, ``pbs`` (PBS Pro), ``lsf``, ``sge``, ``kubernetes``, or ``local``, which starts processes here.
    partition, account : str, optional
        Partition or queue, and account or project.
    walltime : str
        HH:MM:SS of one job. Towards its end a job takes no new slide and is replaced by another.
    limit : str, optional
        HH:MM:SS of the whole run; then no new slide is begun and the run ends with exit code 4.
    jobs : int
        Most jobs at once.
    workers : int
        Worker processes per job.
    cores, memory_gb, gpus : int, float, int
        Per worker.
    options : tuple of str
        Further lines for the head of the job's script, as the scheduler reads them: ``#SBATCH --qos=long``.
    worker_init : str
        Shell lines before the workers start: modules, containers. No passwords: batch systems show scripts.
    retries : int
        How often a slide whose worker died is tried again before it has failed as ``worker-lost``.
    address : str, optional
        Host name or address under which workers reach this machine; all of its addresses are tried unless given.
    ports : (int, int)
        Range that the driver listens in.
    image, namespace, volumes : str, str, mapping
        Of Kubernetes: container image, namespace, and claims of volumes with where they are mounted.
    stages : mapping
        Other values for one stage, by its first word: ``tile``, ``extract``, ``train``, ``heatmap``.
    """

    provider: Literal["slurm", "pbs", "lsf", "sge", "kubernetes", "local"] = "local"
    partition: str | None = None
    account: str | None = None
    walltime: str = Field(default="04:00:00", pattern=WALLTIME)
    limit: str | None = Field(default=None, pattern=WALLTIME)
    jobs: int = Field(default=1, ge=1)
    workers: int = Field(default=1, ge=1)
    cores: int = Field(default=1, ge=1)
    memory_gb: float = Field(default=4.0, gt=0)
    gpus: int = Field(default=0, ge=0)
    options: tuple[str, ...] = ()
    worker_init: str = ""
    retries: int = Field(default=2, ge=0)
    address: str | None = None
    ports: tuple[int, int] = (54000, 56000)
    image: str | None = None
    namespace: str = "default"
    volumes: dict[str, str] = Field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> "Site":
        if self.provider == "kubernetes" and not self.image:
            raise ValueError("provider kubernetes needs the option image")
        for line in (*self.worker_init.splitlines(), *self.options):
            if found := SECRET.search(line):
                raise ValueError(
                    f"{found[1]} is written out, and batch systems show scripts to others; set it in your environment, "
                    f"or read it from a file that only you can read: {found[1]}=$(cat FILE)"
                )
        for name in self.stages:
            self.of_stage(name)
        return self

    @classmethod
    def read(cls, path: Path) -> "Site":
        """Read a site from a YAML file; `ConfigError` where it is not one."""
        return cls.parse(read_yaml(path), source=str(path))

    def of_stage(self, stage: str) -> "Site":
        """Return the site as one stage gets it."""
        own = self.stages.get(stage.split()[0], {})
        base = self.model_dump(mode="json", exclude={"stages"})
        return Site.parse(merge(base, own), source=f"cluster.stages.{stage.split()[0]}")

    def seconds(self, text: str) -> int:
        """Return a time as HH:MM:SS in seconds."""
        hours, minutes, seconds = map(int, text.split(":"))
        return 3600 * hours + 60 * minutes + seconds

    @property
    def drain_s(self) -> int:
        """Seconds after the start of a job from which it takes no new slide."""
        whole = self.seconds(self.walltime)
        return int(whole - min(DRAIN_SHARE * whole, DRAIN_MOST_S))

    def blocks(self, n_items: int) -> int:
        """Return how many jobs so many items need."""
        return max(1, min(self.jobs, -(-n_items // self.workers)))

    def setup(self) -> str:
        """Return the shell lines before the workers start: this environment, the cores, then the user's own."""
        scripts = shlex.quote(sysconfig.get_path("scripts"))
        return f"export PATH={scripts}:$PATH\nexport OMP_NUM_THREADS={self.cores}\n{self.worker_init}"

    def executor(self, label: str, n_items: int, folder: Path) -> "HighThroughputExecutor":
        """Return Parsl's executor for a stage; `MissingPackageError` without Parsl."""
        try:
            from parsl.executors import HighThroughputExecutor
        except ImportError as error:
            raise MissingPackageError(error) from None
        return HighThroughputExecutor(
            label=label,
            provider=self.provider_of(n_items),
            address=self.address or ("127.0.0.1" if self.provider == "local" else None),
            worker_port_range=self.ports,
            interchange_launch_cmd=[sys.executable, "-m", "eosin.cluster._interchange"],
            max_workers_per_node=self.workers,
            cores_per_worker=FEW_CORES,
            heartbeat_period=HEARTBEAT_S,
            heartbeat_threshold=LOST_S,
            drain_period=None if self.provider == "local" else self.drain_s,
            worker_logdir_root=str(folder),
            encrypted=True,
        )

    def provider_of(self, n_items: int) -> Any:
        """Return what asks the batch system for jobs."""
        import parsl

        providers: Any = parsl.providers  # most of its classes have no types
        blocks = self.blocks(n_items)
        common: dict[str, Any] = {
            "init_blocks": blocks,
            "max_blocks": blocks,
            "worker_init": self.setup(),
        }
        batch = {**common, "walltime": self.walltime, "scheduler_options": "\n".join(self.options)}
        cores, memory, gpus = self.workers * self.cores, self.workers * self.memory_gb, self.workers * self.gpus
        match self.provider:
            case "slurm":
                return providers.SlurmProvider(
                    partition=self.partition,
                    account=self.account,
                    cores_per_node=cores,
                    mem_per_node=max(1, round(memory)),
                    gpus_per_node=gpus or None,
                    exclusive=False,
                    **batch,
                )
            case "pbs":
                wanted = f"mem={max(1, round(memory))}gb" + (f":ngpus={gpus}" if gpus else "")
                return providers.PBSProProvider(
                    queue=self.partition, account=self.account, cpus_per_node=cores, select_options=wanted, **batch
                )
            case "lsf":
                return providers.LSFProvider(
                    queue=self.partition,
                    project=self.account,
                    cores_per_block=cores,
                    cores_per_node=cores,
                    request_by_nodes=False,
                    **batch,
                )
            case "sge":
                return providers.GridEngineProvider(queue=self.partition, **batch)
            case "kubernetes":
                return providers.KubernetesProvider(
                    image=self.image,
                    namespace=self.namespace,
                    init_cpu=cores,
                    max_cpu=cores,
                    init_mem=f"{round(1024 * memory)}Mi",
                    max_mem=f"{round(1024 * memory)}Mi",
                    extra_limits={"nvidia.com/gpu": str(gpus)} if gpus else None,
                    persistent_volumes=list(self.volumes.items()),
                    **common,
                )
        return providers.LocalProvider(**common)

    def describe(self, stage: str, n_items: int) -> list[str]:
        """Return what would be submitted for a stage, for a person."""
        where = {"slurm": "SLURM", "pbs": "PBS", "lsf": "LSF", "sge": "Grid Engine"}.get(self.provider, self.provider)
        gpus = f", {self.gpus} GPU{'s' * (self.gpus != 1)}" if self.gpus else ""
        named = {"partition": self.partition, "account": self.account}
        lines = [
            f"{stage}: {n_items} tasks on {where}, at most {self.blocks(n_items)} jobs of {self.workers} workers with "
            f"{self.cores} cores, {self.memory_gb:g} GB{gpus} each; walltime {self.walltime}"
            + "".join(f", {name} {value}" for name, value in named.items() if value)
        ]
        return lines + [f"  {line}" for line in (*self.options, *self.setup().splitlines()) if line.strip()]
