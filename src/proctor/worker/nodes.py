"""The nodes of this worker's job, for servers that are spread over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from proctor.errors import LaunchError
from proctor.infer.servers.stalls import Activity
from proctor.infer.servers.steps import StepTerms, srun_words
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.steps import addresses, end_steps, host_names, step_use
from proctor.worker.assignment import SlurmTerms


async def step_terms(
    terms: SlurmTerms, environ: Mapping[str, str], *, commands: Commands | None = None
) -> StepTerms | None:
    """Which nodes the job's servers share; None for a job of one node, whose server the worker starts by itself.

    Raises LaunchError if the job has another number of nodes than its servers are to have.
    """
    wanted = terms.nodes_per_server * terms.servers
    there = int(environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or 1)
    if there != wanted:
        raise LaunchError(
            f"the job has {there} nodes, but {terms.servers} servers with {terms.nodes_per_server} nodes each need "
            f"{wanted}",
            hint="remove `nodes` from launch.sbatch, or correct launch.servers and launch.nodes_per_server; then "
            "repeat `proctor submit`",
        )
    if wanted == 1:
        return None
    commands = commands or Commands()
    hosts = await host_names(commands, environ.get("SLURM_JOB_NODELIST", ""))
    if len(hosts) != wanted:
        raise LaunchError(
            f"SLURM_JOB_NODELIST names {len(hosts)} nodes ({', '.join(hosts)}), but the job has {wanted}",
            hint="see `scontrol show job` of this job",
        )
    job = environ["SLURM_JOB_ID"]
    return StepTerms(
        job=job,
        hosts=hosts,
        addresses=await addresses(commands, hosts),
        nodes_per_server=terms.nodes_per_server,
        gpus=tuple(d for d in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d),
        end=partial(end_steps, commands, job),
        look=partial(_look, commands, job),
    )


async def _look(commands: Commands, job: str, name: str, hosts: Sequence[str], devices: str | None) -> Activity | None:
    srun = srun_words(job, f"look-{name}", hosts)
    found = await step_use(commands, job, name, srun, len(hosts), devices)
    return None if found is None else Activity(cpu_s=found.cpu_s, gpu_percent=found.gpu_percent)
