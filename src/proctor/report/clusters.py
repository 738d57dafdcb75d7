"""The tables of `proctor clusters`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from proctor.config.clusters import Choice, ClusterProfile, Override
from proctor.report.layout import Layout, Line, heading
from proctor.report.text import count


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at on a cluster."""

    what: str
    state: Literal["ok", "warning", "failed"]
    said: str
    hint: str | None = None


def profile_table(
    profiles: Sequence[ClusterProfile], choice: Choice | None, hosts: Sequence[str], places: Sequence[str]
) -> Layout:
    """Every profile, and which one a job from here would use. `places`: where files of profiles are looked for."""
    chosen = choice.profile.name if choice is not None else None
    names = ("cluster", "hosts", "partition", "queue limit", "GPUs a node", "from", "about")
    lines = tuple(
        Line(
            cells=(
                f"{p.name} *" if p.name == chosen else p.name,
                " ".join(p.hosts) or "-",
                p.partition or "-",
                "-" if p.queue_limit is None else count(p.queue_limit),
                "-" if p.gpus_per_node is None else str(p.gpus_per_node),
                p.source,
                p.description or "-",
            ),
            strong=p.name == chosen,
        )
        for p in profiles
    )
    if choice is not None:
        note = f"* used from here: {choice.reason}"
    else:
        named = " and ".join(dict.fromkeys(map(repr, hosts)))
        note = f"none is used from here: this machine is called {named}; name one with launch.cluster"
    own = f"profiles of your own, or changes to these: {', '.join(places)}"
    return Layout(title="clusters", columns=heading(*names, right=names[3:5]), lines=lines, notes=(note, own))


def settings_table(
    profile: ClusterProfile, reason: str, values: Mapping[str, Any], overrides: Sequence[Override]
) -> Layout:
    """Every value of a cluster as a job would have it, with what it was before something replaced it."""
    replaced = {o.key: o for o in overrides}
    lines: list[Line] = []
    for key, value in values.items():
        over = replaced.get(key)
        came = profile.source if over is None else f"{over.source}; the profile says {_word(over.profile_value)}"
        lines.append(
            Line(
                cells=(key, _word(value), came if over or value not in (None, (), {}) else ""), strong=over is not None
            )
        )
    return Layout(
        title=f"cluster {profile.name}: {profile.description or 'no description'}",
        columns=heading("key", "value", "from"),
        lines=tuple(lines),
        notes=(reason, f"not the profile's: {', '.join(replaced)}" if replaced else "all values are the profile's"),
    )


def finding_table(cluster: str, findings: Sequence[Finding]) -> Layout:
    """What a look at the cluster found, with what to do about it."""
    lines = tuple(
        Line(cells=(f.what, f.state, f.said if f.hint is None else f"{f.said} → {f.hint}"), warn=f.state != "ok")
        for f in findings
    )
    return Layout(title=f"check of {cluster}", columns=heading("what", "state", "found"), lines=lines)


def _word(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        pairs = [(k, v) for k, v in items if v not in (None, (), [], "", {})]
        return ", ".join(f"{k}: {_word(v)}" for k, v in pairs) or "-"
    if isinstance(value, list | tuple):
        return " ".join(map(str, cast("Sequence[Any]", value))) or "-"
    return str(value)
