"""Submission against a real controller: arrays under the limits, and one clear message for each refusal."""

from __future__ import annotations

import pytest

from proctor.errors import LaunchError, LimitReached, ProctorError, UnknownName, Unreachable
from proctor.launch.slurm.cluster import Demand, check_demand, read_limits, read_partitions
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.queue import load, read_queue
from proctor.launch.slurm.submission import Chunk, Submission, submit, submit_elements

from .cluster import Cluster

SCRIPT = "#!/bin/sh\n#SBATCH --output=/dev/null --hold --time=10\nsleep 60\n"


def render(chunk: Chunk) -> Submission:
    return Submission(script=SCRIPT + f"# from {chunk.offset}\n")


async def test_ten_thousand_elements_take_ten_calls(slurm: Cluster) -> None:
    commands = Commands()
    limits = await read_limits(commands)
    assert (limits.cluster, limits.max_array) == ("proctor", 1001)
    done = await submit_elements(commands, render, 10_000, max_array=limits.max_array, throttle=16)
    assert len(done.jobs) == 10
    assert (done.owed, done.stopped_by) == (0, None)
    records = read_queue(commands)
    ids = {job for _, job in done.jobs}
    mine = [record for record in records if record.array in ids]
    assert len(mine) == load(mine) == 10_000
    assert len({record.id for record in mine}) == 10_000


async def test_an_array_over_the_limit_is_refused_by_name(slurm: Cluster) -> None:
    commands = Commands()
    with pytest.raises(LimitReached, match="MaxArraySize") as caught:
        await submit(commands, Submission(script=SCRIPT, array="0-1001"))
    assert caught.value.limit == "MaxArraySize"
    assert "grep MaxArraySize" in str(caught.value)


async def test_a_queue_limit_counts_what_is_there_already(slurm: Cluster) -> None:
    commands = Commands()
    first = await submit_elements(commands, render, 7, max_array=5, queue_limit=10)
    assert ([chunk.size for chunk, _ in first.jobs], first.owed) == ([4, 3], 0)
    second = await submit_elements(commands, render, 7, max_array=5, queue_limit=10)
    assert ([chunk.size for chunk, _ in second.jobs], second.owed) == ([3], 4)
    assert isinstance(second.stopped_by, LimitReached)
    third = await submit_elements(commands, render, 4, max_array=5, queue_limit=10)
    assert (third.jobs, third.owed) == ((), 4)


@pytest.mark.parametrize(
    ("submission", "limit", "sizes"),
    [
        (Submission(script=SCRIPT, qos="small"), "QOSMaxSubmitJobPerUserLimit", 4),
        (Submission(script=SCRIPT, account="limited"), "AssocMaxSubmitJobLimit", 3),
    ],
    ids=["QOS", "association"],
)
async def test_a_limit_of_accounting_is_filled_and_named(
    slurm_accounting: Cluster, submission: Submission, limit: str, sizes: int
) -> None:
    done = await submit_elements(Commands(), lambda _: submission, 50, max_array=1001)
    assert sum(chunk.size for chunk, _ in done.jobs) == sizes
    assert done.owed == 50 - sizes
    assert isinstance(done.stopped_by, LimitReached)
    assert done.stopped_by.limit == limit
    offsets = [(chunk.offset, chunk.size) for chunk, _ in done.jobs]
    assert offsets == [(sum(size for _, size in offsets[:i]), size) for i, (_, size) in enumerate(offsets)]


@pytest.mark.parametrize(
    ("submission", "kind", "words"),
    [
        (Submission(script=SCRIPT, partition="gpuu"), UnknownName, "partition 'gpuu'"),
        (Submission(script=SCRIPT, account="nope"), UnknownName, "account 'nope'"),
        (Submission(script=SCRIPT, qos="nope"), UnknownName, "qos 'nope'"),
        (Submission(script=SCRIPT.replace("--hold", "--gpus=9 -N1")), LaunchError, "no node of the partition has"),
        (Submission(script=SCRIPT.replace("--time=10", "--time=soon")), LaunchError, "time limit"),
        (Submission(script=SCRIPT, dependency="afterok:soon"), LaunchError, "job to wait for"),
    ],
    ids=["partition", "account", "QOS", "GPUs", "time", "dependency"],
)
async def test_refusals_name_the_value_and_the_next_command(
    slurm_accounting: Cluster, submission: Submission, kind: type[ProctorError], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        await submit(Commands(), submission)
    assert caught.value.hint
    assert "`" in caught.value.hint
    assert read_queue(Commands()) == [] or load(read_queue(Commands())) == 0


async def test_a_controller_that_is_down_is_told_from_an_empty_queue(slurm: Cluster) -> None:
    commands = Commands()
    slurm.kill_controller()
    with pytest.raises(Unreachable, match="the Slurm controller does not answer"):
        read_queue(commands)
    with pytest.raises(Unreachable, match="scontrol ping"):
        await submit(commands, Submission(script=SCRIPT))
    slurm.start_controller()
    read_queue(commands)


@pytest.mark.parametrize(
    ("demand", "words"),
    [
        (Demand(partition="shrt"), "did you mean 'short'"),
        (Demand(partition="short", time_limit_s=600), "beyond MaxTime 00:05:00 of partition 'short'"),
        (Demand(partition="short", time_limit_s=120, least_s=600), "too short: .* take 00:10:00"),
        (Demand(partition="short", nodes=2), "MaxNodes is 1|it has 1"),
        (Demand(nodes=9), "9 nodes are asked of partition 'main'; it has 4"),
        (Demand(gpus_per_node=5), "at most 4 GPUs"),
        (Demand(gpus_per_node=1, gpu_type="h100"), "it has a100"),
        (Demand(cpus_per_node=64), "and 2 CPUs a node"),
    ],
)
async def test_what_would_wait_for_ever_is_refused_before(slurm: Cluster, demand: Demand, words: str) -> None:
    partitions = await read_partitions(Commands())
    with pytest.raises(ProctorError, match=words) as caught:
        check_demand(demand, partitions)
    assert caught.value.hint


async def test_a_fitting_demand_gets_its_partition(slurm: Cluster) -> None:
    partitions = await read_partitions(Commands())
    assert check_demand(Demand(gpus_per_node=4, nodes=4, cpus_per_node=2), partitions).name == "main"
    assert check_demand(Demand(partition="short,main", time_limit_s=600), partitions).name == "main"
    assert check_demand(Demand(partition="short"), partitions).max_time_s == 300
