"""What a guarded command leaves behind: nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from proctor.processes.group import ProcessGroup, last_words, tail

TREE = """
import subprocess, sys, time

def run(code, **more):
    subprocess.Popen([sys.executable, "-c", code], **more)

# A child in the group, a grandchild that has left both the group and the session, and one deaf to SIGTERM.
run("import time; time.sleep(600)")
run(
    "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(601)'])",
    start_new_session=True,
)
run(
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print('deaf', flush=True); time.sleep(602)"
)
print("ready", flush=True)
time.sleep(600)
"""


async def until(check, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.02)


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if is_alive(pid)}


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # also where it ends between two looks
        return False


async def start_tree(log: Path, grace_s: float = 0.3) -> tuple[ProcessGroup, set[int]]:
    group = await ProcessGroup.start([sys.executable, "-c", TREE], env=os.environ, log=log, grace_s=grace_s)
    await until(lambda: "deaf" in tail(log) and "ready" in tail(log) and len(group.commands()) >= 4)
    pids = {process.pid for process in group.commands()} | {group.pid}
    return group, pids


async def test_stop_ends_everything_even_the_deaf_and_the_runaway(tmp_path: Path) -> None:
    group, pids = await start_tree(tmp_path / "log")
    await group.stop()
    assert not alive(pids)
    assert group.returncode is not None


async def test_stop_is_finished_when_the_caller_is_cancelled(tmp_path: Path) -> None:
    group, pids = await start_tree(tmp_path / "log")
    task = asyncio.create_task(group.stop())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(pids)


async def test_killed_guard_takes_the_command_along_and_stop_sweeps_the_rest(tmp_path: Path) -> None:
    group, pids = await start_tree(tmp_path / "log")
    command = psutil.Process(group.pid).children()[0].pid
    os.kill(group.pid, signal.SIGKILL)
    await group.wait()
    await until(lambda: not alive({command}))
    await group.stop()
    assert not alive(pids)
    assert group.returncode == 128 + signal.SIGKILL


PARENT = """
import asyncio, os, sys
from pathlib import Path
from proctor.processes.group import ProcessGroup

async def main():
    argv, log = [sys.executable, "-c", sys.argv[2]], Path(sys.argv[1])
    group = await ProcessGroup.start(argv, env=os.environ, log=log, grace_s=0.3)
    print(group.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_nothing_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with subprocess.Popen([sys.executable, "-c", PARENT, str(log), TREE], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        guard = int(parent.stdout.readline())
        await until(lambda: "deaf" in tail(log) and len(psutil.Process(guard).children(recursive=True)) >= 4)
        pids = {process.pid for process in psutil.Process(guard).children(recursive=True)} | {guard}
        parent.kill()
    await until(lambda: not alive(pids))


async def test_signals_reach_the_command_and_its_status_comes_back(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(7))\n"
        "print('up', flush=True)\n"
        "time.sleep(60)"
    )
    group = await ProcessGroup.start([sys.executable, "-c", code], env=os.environ, log=tmp_path / "log")
    await until(lambda: "up" in tail(tmp_path / "log"))
    group.signal(signal.SIGINT)
    assert await group.wait() == 7
    await group.stop()


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["/no/such/program"], 127, "cannot run '/no/such/program'"),
        (["/"], 126, "cannot run '/'"),
        (["/bin/sh", "-c", "kill -9 $$"], 137, ""),
    ],
)
async def test_status_of_what_cannot_run(tmp_path: Path, argv: list[str], code: int, said: str) -> None:
    group = await ProcessGroup.start(argv, env=os.environ, log=tmp_path / "log")
    assert await group.wait() == code
    assert said in tail(tmp_path / "log")
    await group.stop()


async def test_hostile_arguments_arrive_as_they_are(tmp_path: Path) -> None:
    hostile = ["a b", "'", '"', "$(touch /tmp/never)", "line\nbreak", "*", "ünï", "--", ""]
    code = "import sys, json; print(json.dumps(sys.argv[1:]))"
    log = tmp_path / "a $(b) 'c'\nd" / "log"
    group = await ProcessGroup.start([sys.executable, "-c", code, *hostile], env=os.environ, log=log)
    assert await group.wait() == 0
    assert json.loads(tail(log)) == hostile
    await group.stop()


async def test_inherited_descriptors_are_passed_on_and_closed(tmp_path: Path) -> None:
    read, write = os.pipe()
    group = await ProcessGroup.start(
        [sys.executable, "-c", f"import os; os.write({write}, b'hello')"],
        env=os.environ,
        log=tmp_path / "log",
        pass_fds=[write],
    )
    os.close(write)
    with os.fdopen(read, "rb") as file:
        assert await asyncio.to_thread(file.read) == b"hello"
    assert await group.wait() == 0
    await group.stop()


def test_tail_keeps_the_last_state_of_a_progress_bar(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"first\n 10%\r 50%\r100%\r\nbad \xff byte\n\n")
    assert tail(log) == "first\n100%\nbad � byte"
    assert tail(log, lines=1) == "bad � byte"
    assert tail(tmp_path / "absent") == ""


@pytest.mark.parametrize("before", ["", "(Core pid=7) ERROR 07:00:01 [core.py:70] "])
def test_last_words_are_what_happened_not_where(tmp_path: Path, before: str) -> None:
    lines = [
        "loading shards",
        "Traceback (most recent call last):",
        '  File "/a/b.py", line 3, in main',
        "    load()",
        "    ^^^^^^",
        '  File "/a/c.py", line 9, in load',
        "    raise ValueError(",
        "ValueError: no tokens",
        "  File this under odd",
    ]
    log = tmp_path / "log"
    log.write_text("".join(before + line + "\n" for line in lines))
    assert last_words(log) == "\n".join(before + line for line in (lines[0], *lines[-2:]))
    assert last_words(log, lines=1) == before + lines[-1]
