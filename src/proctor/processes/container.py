"""A command inside a container: one pure function for every kind.

Values of environment variables never get into an argument list: kinds that inherit the environment just do, the
others are told names only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from proctor.errors import ConfigError
from proctor.interpreters import Command

ContainerType = Literal["apptainer", "singularity", "pyxis", "enroot", "charliecloud", "podman"]

_CLEARED: Final = {"apptainer": "APPTAINERENV_", "singularity": "SINGULARITYENV_"}
"""Kinds that can start from a clean environment (--cleanenv), and what then marks a variable for the inside."""
_SEPARATORS: Final = {"pyxis": ":,", "enroot": ": \t", "charliecloud": ":", "podman": ":,", "apptainer": ":,"}
"""What a path cannot hold in a bind of that kind: none of them can quote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    """A directory of the node that is seen inside."""

    source: str
    target: str
    read_only: bool = False

    @classmethod
    def parse(cls, text: str) -> Bind:
        """`/data`, `/data:/inside` or `/data:/inside:ro`. Raises ConfigError for anything else."""
        source, *rest = text.split(":")
        target = rest[0] if rest else source
        mode = rest[1] if len(rest) > 1 else "rw"
        if not source or not target.startswith("/") or mode not in ("rw", "ro") or len(rest) > 2:
            raise ConfigError(
                f"the bind {text!r} is not of the form /from, /from:/to or /from:/to:ro",
                hint="see launch.container.binds",
            )
        return cls(source=source, target=target, read_only=mode == "ro")


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A container image and how to run it."""

    type: ContainerType
    image: str
    args: tuple[str, ...] = ()
    binds: tuple[Bind, ...] = ()

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Container:
        """From what `dataclasses.asdict` made of one, by way of JSON. Raises KeyError, TypeError for anything else."""
        return cls(
            type=fields["type"],
            image=fields["image"],
            args=tuple(fields["args"]),
            binds=tuple(Bind(**bind) for bind in fields["binds"]),
        )


def contained(
    container: Container, command: Command, *, forward: Sequence[str] = (), binds: Sequence[Bind] = ()
) -> Command:
    """The command that runs `command` inside `container`.

    `forward` names variables of `command.env` that must be seen inside whatever the container's options say;
    `binds` come after the container's own. Raises ConfigError for a bind that this kind cannot express.
    """
    args = container_argv(container, command.argv, forward=forward, binds=binds)
    env = dict(command.env)
    prefix = _CLEARED.get(container.type)
    if prefix is not None:
        env |= {prefix + name: env[name] for name in forward if name in env}
    return Command(argv=tuple(args), env=env)


def container_argv(
    container: Container, argv: Sequence[str], *, forward: Sequence[str] = (), binds: Sequence[Bind] = ()
) -> list[str]:
    """`argv` wrapped: nothing in it is interpreted by a shell, and no value of a variable is part of it."""
    kind = container.type
    mounts = [_spelt(kind, bind) for bind in dict.fromkeys((*container.binds, *binds))]
    image, args = container.image, container.args
    match kind:
        case "apptainer" | "singularity":
            return [kind, "exec", *args, *(w for m in mounts for w in ("--bind", m)), image, *argv]
        case "pyxis":
            # One task on this node, inside the allocation's own step, next to whatever runs there.
            options = pyxis_options(container, forward, binds)
            return ["srun", "--nodes=1", "--ntasks=1", "--overlap", "--export=ALL", *options, *args, *argv]
        case "enroot":
            words = [w for m in mounts for w in ("--mount", m)] + [w for n in forward for w in ("--env", n)]
            return ["enroot", "start", *args, *words, image, *argv]
        case "charliecloud":
            return ["ch-run", *args, *(w for m in mounts for w in ("--bind", m)), image, "--", *argv]
        case "podman":
            words = [w for m in mounts for w in ("--volume", m)] + [w for n in forward for w in ("--env", n)]
            return ["podman", "run", "--rm", "--network=host", *words, *args, image, *argv]


def pyxis_options(container: Container, forward: Sequence[str], binds: Sequence[Bind]) -> list[str]:
    """What srun is given for a pyxis container, without its own `args`. Raises ConfigError as `contained` does."""
    mounts = [_spelt("pyxis", bind) for bind in dict.fromkeys((*container.binds, *binds))]
    options = ["--container-image=" + container.image]
    options += ["--container-mounts=" + ",".join(mounts)] if mounts else []
    options += ["--container-env=" + ",".join(forward)] if forward else []
    return options


def _spelt(kind: ContainerType, bind: Bind) -> str:
    for path in (bind.source, bind.target):
        bad = sorted({ch for ch in path if ch in _SEPARATORS.get(kind, ":,") or ch < " "})
        if bad:
            raise ConfigError(
                f"the bind {path!r} contains {', '.join(map(repr, bad))}, which {kind} cannot express",
                hint="bind a directory above it, or give it another name",
            )
    if not bind.read_only:
        return f"{bind.source}:{bind.target}"
    if kind == "charliecloud":
        # ch-run mounts what it binds as it is; read-only is the image's matter.
        raise ConfigError(f"charliecloud has no read-only binds, as {bind.source!r} asks for", hint="leave `:ro` out")
    return f"{bind.source}:{bind.target}:ro"
