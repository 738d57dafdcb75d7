"""`proctor clusters`."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict

import click

from proctor import api
from proctor.cli.options import json_option, print_json, set_option
from proctor.errors import UsageError
from proctor.report.clusters import finding_table, profile_table, settings_table
from proctor.report.layout import show

ACTIONS = ("list", "show", "detect", "check")


@click.command()
@click.argument("action", type=click.Choice(ACTIONS), default="list")
@click.argument("name", required=False)
@click.option("--config", type=click.Path(), help="A run.yaml whose launch goes over the profile.")
@set_option
@json_option
def command(action: str, name: str | None, config: str | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """List cluster profiles; show one with all overrides; detect which one this is; check that it will run jobs.

    NAME is for show and check; without it, the cluster that a run from here would use.
    """
    if name is not None and action in ("list", "detect"):
        raise UsageError(f"`clusters {action}` takes no name", hint=f"`proctor clusters show {name}`")
    if action == "list":
        known = api.clusters(config)
        if as_json:
            used = None if known.choice is None else {"name": known.choice.profile.name, "reason": known.choice.reason}
            print_json({"clusters": [p.model_dump() for p in known.profiles], "used": used, "files": known.files})
        else:
            show(profile_table(known.profiles, known.choice, known.hosts, known.places), sys.stdout)
        return 0
    if action == "detect":
        choice = api.detect_cluster(config)
        if as_json:
            print_json({"name": choice.profile.name, "reason": choice.reason})
        else:
            click.echo(f"{choice.profile.name}: {choice.reason}")
        return 0
    return _one(action, name, config, overrides, as_json=as_json)


def _one(action: str, name: str | None, config: str | None, overrides: tuple[str, ...], *, as_json: bool) -> int:
    found = api.resolve_cluster(name, config, overrides)
    if action == "show":
        if as_json:
            replaced = [asdict(o) for o in found.settings.overrides]
            named = {"name": found.profile.name, "source": found.profile.source, "reason": found.reason}
            print_json(named | {"values": found.values, "overrides": replaced})
        else:
            table = settings_table(found.profile, found.reason, found.values, found.settings.overrides)
            show(table, sys.stdout)
        return 0
    checked = asyncio.run(api.check_cluster(found))
    if as_json:
        print_json(asdict(checked) | {"usable": checked.usable})
    else:
        show(finding_table(checked.cluster, checked.findings), sys.stdout)
    return 0 if checked.usable else 1
