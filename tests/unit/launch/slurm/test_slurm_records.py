"""Reading what Slurm prints."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proctor.errors import LaunchError
from proctor.launch.launcher import JobState
from proctor.launch.slurm.cluster import (
    Demand,
    check_demand,
    choose_partition,
    count_gpus,
    limits_of,
    partitions_of,
)
from proctor.launch.slurm.queue import load
from proctor.launch.slurm.records import (
    QueueRecord,
    duration,
    exit_status,
    expand_tasks,
    moment,
    parse_accounting,
    parse_pairs,
    parse_queue,
    parse_settings,
)
from proctor.launch.slurm.states import job_state

from .conftest import DATA, queue_line


def read(name: str) -> str:
    return (DATA / name).read_text()


def by_id(records: list[QueueRecord]) -> dict[str, QueueRecord]:
    return {record.id: record for record in records}


def test_a_recorded_queue() -> None:
    records = by_id(parse_queue(read("squeue.txt")))
    assert {name: r.stands for name, r in records.items() if r.stands is not JobState.PENDING} == {
        "44": JobState.DONE,
        "43": JobState.FAILED,
        "45": JobState.FAILED,
        "42_0": JobState.RUNNING,
        "42_1": JobState.RUNNING,
        "42_2": JobState.RUNNING,
        "42_3": JobState.RUNNING,
        "47": JobState.RUNNING,
        "48": JobState.RUNNING,
        "49": JobState.RUNNING,
    }
    assert (records["43"].exit_status, records["45"].exit_status, records["44"].exit_status) == (3, 137, 0)
    assert (records["42_0"].restarts, records["42_0"].completing, records["42_0"].job) == (1, True, "50")
    assert records["49"].reason == "job requeued in held state"
    assert records["47"].name == 'a "b" ü;$x|y\nz'
    assert records["42_2"].nodes == "n3"
    assert records["42_2"].ends == 1795261230.0
    assert records["46_15"].reason == "JobHeldUser"
    assert load(list(records.values())) == len(records) - 3


def test_arrays_that_squeue_leaves_together_are_expanded() -> None:
    apart, together = (
        {name: r for name, r in by_id(parse_queue(read(file))).items() if r.stands is JobState.PENDING}
        for file in ("squeue.txt", "squeue-unexpanded.txt")
    )
    assert set(apart) <= set(together)
    assert {"42_4", "42_9", "46_1", "46_20"} <= set(together)


def test_a_recorded_accounting() -> None:
    records = by_id(parse_accounting(read("sacct.txt")))
    assert {name: r.stands for name, r in records.items()} == {
        "5": JobState.FAILED,
        "6": JobState.CANCELLED,
        "4_0": JobState.FAILED,
        "4_5": JobState.RUNNING,
    }
    assert (records["5"].exit_status, records["4_0"].exit_status, records["4_5"].exit_status) == (137, 3, None)
    assert (records["4_0"].job, records["6"].nodes, records["6"].started) == ("7", "", None)


def test_accounting_of_an_array_that_waits() -> None:
    line = "9_[0-2,7%2]|9|PENDING|0:0|2026-11-21T10:40:35|Unknown|Unknown|None assigned|u|a|q|main|wrap"
    assert [record.id for record in parse_accounting(line)] == ["9_0", "9_1", "9_2", "9_7"]


@pytest.mark.parametrize("line", ["slurm_load_jobs error", "1|1|N/A|RUNNING|x" + "|" * 11, "1|2|3"])
def test_a_line_that_is_no_record_is_an_error_and_not_skipped(line: str) -> None:
    with pytest.raises(LaunchError, match="squeue printed"):
        parse_queue(line)


def test_an_unknown_state_is_neither_ended_nor_ignored() -> None:
    with pytest.raises(LaunchError, match="'HIBERNATING', which Proctor does not know; known: PENDING"):
        parse_queue(queue_line("7", "HIBERNATING"))


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("CANCELLED by 1000", JobState.CANCELLED),
        ("CANCELLED+", JobState.CANCELLED),
        ("REQUEUE_HOLD", JobState.PENDING),
        ("SPECIAL_EXIT", JobState.PENDING),
        ("OUT_OF_MEMORY", JobState.FAILED),
        ("SUSPENDED", JobState.RUNNING),
    ],
)
def test_words(word: str, state: JobState) -> None:
    assert job_state(word) is state


@settings(max_examples=20)
@given(st.sets(st.integers(0, 500), min_size=1, max_size=40), st.integers(1, 9))
def test_expansion_is_the_inverse_of_the_list(indices: set[int], throttle: int) -> None:
    assert expand_tasks(f"[{','.join(map(str, sorted(indices)))}]%{throttle}") == sorted(indices)


def test_ranges_and_steps() -> None:
    assert expand_tasks("0-3,7%2") == [0, 1, 2, 3, 7]
    assert expand_tasks("6-14:4%3") == [6, 10, 14]
    with pytest.raises(LaunchError, match=r"cannot read the array indices '1,\.\.\.'"):
        expand_tasks("1,...")


def test_values() -> None:
    assert [exit_status(text) for text in ("768", "9", "3:0", "0:15", "0", "", "x:y")] == [
        3,
        137,
        3,
        143,
        0,
        None,
        None,
    ]
    assert duration("1-02:03:04") == 93784
    assert [duration(text) for text in ("00:05:00", "5:00", "5", "UNLIMITED", "NONE")] == [300, 300, 300, None, None]
    assert moment("2026-11-21T10:18:57") == 1795256337.0
    assert [moment(text) for text in ("N/A", "Unknown", "")] == [None, None, None]


def test_a_recorded_job() -> None:
    shown = parse_pairs(read("job.txt").strip())
    assert (shown["JobId"], shown["ArrayTaskId"], shown["Restarts"]) == ("50", "0", "1")
    assert (shown["EndTime"], shown["TimeLimit"], shown["TresPerJob"]) == (
        "2026-11-21T11:40:33",
        "01:00:00",
        "gres:gpu:1",
    )


def test_pairs_with_blanks_and_equals_signs() -> None:
    assert parse_pairs("A=1 Comment=two words x B=p=q Power=") == {
        "A": "1",
        "Comment": "two words x",
        "B": "p=q",
        "Power": "",
    }


def test_recorded_limits() -> None:
    limits = limits_of(parse_settings(read("config.txt")))
    assert (limits.cluster, limits.version, limits.max_array) == ("proctor", "22.05.8", 1001)
    assert (limits.max_jobs, limits.keeps_s, limits.requeues, limits.hides_jobs) == (100000, 300, True, False)
    hidden = limits_of(
        parse_settings(read("config.txt").replace("PrivateData             = none", "PrivateData = jobs,usage"))
    )
    assert hidden.hides_jobs
    with pytest.raises(LaunchError, match="says nothing of ClusterName"):
        limits_of({})


def test_recorded_partitions() -> None:
    partitions = partitions_of(read("partitions.txt"), read("sinfo.txt"))
    assert [p.name for p in partitions] == ["main", "low", "high", "short"]
    assert choose_partition(None, partitions).name == "main"
    short = choose_partition("short", partitions)
    assert (short.max_time_s, short.default_time_s, short.max_nodes, len(short.nodes)) == (300, 60, 1, 1)
    assert (short.most_gpus, short.most_cpus, short.nodes[0].gpu_types) == (4, 2, ("a100",))
    assert choose_partition("low", partitions).preempt_mode == "REQUEUE"


def test_a_partition_that_is_down_takes_nothing() -> None:
    described = read("partitions.txt").replace("State=UP", "State=DRAIN", 1)
    with pytest.raises(LaunchError, match="partition 'main' is DRAIN"):
        check_demand(Demand(), partitions_of(described, read("sinfo.txt")))


def test_nodes_that_are_down_just_now_may_come_back() -> None:
    listed = read("sinfo.txt").replace("|idle|", "|down*|").replace("|mixed|", "|drained|")
    partitions = partitions_of(read("partitions.txt"), listed)
    assert not any(node.usable for node in partitions[0].nodes if node.state in ("down*", "drained"))
    assert check_demand(Demand(gpus_per_node=4), partitions).name == "main"


def test_gpu_counts() -> None:
    assert count_gpus("gpu:a100:4(S:0-1),gpu:v100:2,shard:8") == 6
    assert [count_gpus(text) for text in ("gpu:4", "(null)", "gpu:a100:0(IDX:N/A)", "gpu:a100:3(IDX:0-2)")] == [
        4,
        0,
        0,
        3,
    ]


@pytest.mark.parametrize(
    ("state", "reason", "stuck"),
    [
        ("PENDING", "launch failed requeued held", True),
        ("PENDING", "launch_failed_requeued_held", True),
        ("PENDING", "JobHeldUser", False),
        ("PENDING", "Priority", False),
        ("RUNNING", "launch_failed_requeued_held", False),
    ],
)
def test_only_what_slurm_itself_holds_is_stuck(state: str, reason: str, stuck: bool) -> None:
    (record,) = parse_queue(queue_line("5", state).replace("|None|name|", f"|{reason}|name|"))
    assert record.stuck is stuck
