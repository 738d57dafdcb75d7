"""Commands inside containers: words stay words, values of variables stay out of them."""

from __future__ import annotations

from typing import get_args

import pytest

from proctor.errors import ConfigError
from proctor.interpreters import Command
from proctor.processes.container import Bind, Container, ContainerType, contained, container_argv

KINDS = get_args(ContainerType)
ARGV = ("python", "-m", "server", "--model", "/models/two words", "$(touch pwned)", "a\nb", "-x")


def container(kind: ContainerType, **changes: object) -> Container:
    values = {"image": "/images/env.sif", "args": ("--nv",), "binds": (Bind(source="/data", target="/data"),)}
    return Container(type=kind, **(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_is_at_the_end_word_for_word(kind: ContainerType) -> None:
    argv = container_argv(container(kind), ARGV, forward=("KEY",))
    assert tuple(argv[-len(ARGV) :]) == ARGV
    assert "--nv" in argv
    assert "/images/env.sif" in " ".join(argv)


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_of_a_variable_is_on_the_command_line(kind: ContainerType) -> None:
    command = Command(argv=ARGV, env={"KEY": "secret-value", "PATH": "/bin"})
    wrapped = contained(container(kind), command, forward=("KEY", "ABSENT"))
    assert "secret-value" not in " ".join(wrapped.argv)
    assert wrapped.env["KEY"] == "secret-value"
    if kind in ("apptainer", "singularity"):
        assert wrapped.env[f"{kind.upper()}ENV_KEY"] == "secret-value"


def test_the_words_of_each_kind() -> None:
    binds = (Bind(source="/w", target="/v", read_only=True),)
    assert container_argv(container("apptainer"), ["c"], binds=binds) == [
        *("apptainer", "exec", "--nv", "--bind", "/data:/data", "--bind", "/w:/v:ro", "/images/env.sif", "c")
    ]
    assert container_argv(container("pyxis", args=()), ["c"], forward=("A", "B"), binds=binds) == [
        *("srun", "--nodes=1", "--ntasks=1", "--overlap", "--export=ALL", "--container-image=/images/env.sif"),
        *("--container-mounts=/data:/data,/w:/v:ro", "--container-env=A,B", "c"),
    ]
    assert container_argv(container("enroot"), ["c"], forward=("A",), binds=binds) == [
        *("enroot", "start", "--nv", "--mount", "/data:/data", "--mount", "/w:/v:ro", "--env", "A"),
        *("/images/env.sif", "c"),
    ]
    assert container_argv(container("charliecloud", args=()), ["c"]) == [
        *("ch-run", "--bind", "/data:/data", "/images/env.sif", "--", "c")
    ]
    assert container_argv(container("podman", args=()), ["c"], forward=("A",)) == [
        *("podman", "run", "--rm", "--network=host", "--volume", "/data:/data", "--env", "A", "/images/env.sif", "c")
    ]


def test_a_bind_is_made_once() -> None:
    binds = (Bind(source="/data", target="/data"), Bind(source="/data", target="/data"))
    assert container_argv(container("podman"), ["c"], binds=binds).count("/data:/data") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a", Bind(source="/a", target="/a")),
        ("/a:/b", Bind(source="/a", target="/b")),
        ("/a:/b:ro", Bind(source="/a", target="/b", read_only=True)),
        ("/a:/b:rw", Bind(source="/a", target="/b")),
    ],
)
def test_binds(text: str, expected: Bind) -> None:
    assert Bind.parse(text) == expected


@pytest.mark.parametrize("text", ["", ":/b", "/a:b", "/a:/b:x", "/a:/b:ro:z", "relative"])
def test_no_binds(text: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form"):
        Bind.parse(text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["/a:b", "/a\nb"])
def test_a_path_that_a_kind_cannot_express_is_refused(kind: ContainerType, path: str) -> None:
    with pytest.raises(ConfigError, match="cannot express"):
        container_argv(container(kind), ["c"], binds=(Bind(source=path, target="/b"),))


def test_charliecloud_has_no_read_only_binds() -> None:
    with pytest.raises(ConfigError, match="no read-only binds"):
        container_argv(container("charliecloud"), ["c"], binds=(Bind(source="/a", target="/b", read_only=True),))
