"""The arguments of `graft adapters`."""

from __future__ import annotations

import argparse

from runtime.env import default_admin


def add_adapters(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """All actions and their flags."""
    adapters = commands.add_parser("adapters", help="load, replace, pin, watch and unload adapters of a running server")
    adapters.set_defaults(module="adapters")
    actions = adapters.add_subparsers(dest="action", required=True, metavar="ACTION")
    parsers = [
        _add_load(actions),
        _add_compose(actions),
        _add_unload(actions),
        _add_list(actions),
        _add_named(actions, "show", "everything about one adapter", "NAME, an alias, or NAME@GENERATION"),
        _add_named(actions, "pin", "keep an adapter on the device", "NAME or an alias"),
        _add_named(actions, "unpin", "let an adapter leave the device when others need its place", "NAME or an alias"),
        _add_alias(actions),
        actions.add_parser("watch", help="print every adapter, and then every change until interrupted"),
    ]
    for parser in parsers:
        parser.add_argument("--admin", default=default_admin(), metavar="H:P", help="admin port (default %(default)s)")


def _add_load(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    load = actions.add_parser("load", help="load an adapter folder under a name")
    load.add_argument("name", metavar="NAME")
    load.add_argument("path", metavar="PATH", help="relative to the server's adapters root")
    load.add_argument("--replace", action="store_true", help="replace other bytes of this name; requests go on")
    load.add_argument("--expected-generation", type=int, default=0, metavar="N", help="fail unless this one is live")
    load.add_argument("--expected-digest", default="", metavar="DIGEST", help="fail unless the files have this digest")
    how = load.add_mutually_exclusive_group()
    how.add_argument("--validate-only", action="store_true", help="read, check and tell, but change nothing")
    how.add_argument("--lazy", action="store_true", help="only register it; it is read when a request names it")
    load.add_argument("--pin", action="store_true", help="keep it on the device")
    return load


def _add_compose(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    compose = actions.add_parser("compose", help="give a weighted sum of loaded adapters a name")
    compose.add_argument("name", metavar="NAME")
    compose.add_argument(
        "--from",
        dest="parts",
        action="append",
        required=True,
        metavar="ADAPTER[=WEIGHT]",
        help="a part: NAME, an alias or NAME@GENERATION, and its weight (default 1); once for each part",
    )
    compose.add_argument("--replace", action="store_true", help="replace another adapter of this name; requests go on")
    compose.add_argument("--expected-generation", type=int, default=0, metavar="N", help="fail unless this one is live")
    compose.add_argument("--validate-only", action="store_true", help="check and tell, but change nothing")
    compose.add_argument("--pin", action="store_true", help="keep it on the device")
    return compose


def _add_unload(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    unload = actions.add_parser("unload", help="take no new requests for an adapter and free it")
    unload.add_argument("name", metavar="NAME")
    unload.add_argument("--force", action="store_true", help="end its running requests")
    unload.add_argument("--drain-timeout", type=float, metavar="S", help="wait so many seconds for running requests")
    unload.add_argument("--expected-generation", type=int, default=0, metavar="N", help="fail unless this one is live")
    unload.add_argument("--allow-missing", action="store_true", help="succeed if nothing is loaded")
    return unload


def _add_list(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    listing = actions.add_parser("list", help="all adapters")
    listing.add_argument("--prefix", default="", metavar="TEXT", help="only names that begin so")
    listing.add_argument("--state", default="", metavar="STATE", help="only this state, for instance ready or draining")
    listing.add_argument("--json", action="store_true", help="one JSON object in a line for each adapter")
    return listing


def _add_named(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], action: str, text: str, name: str
) -> argparse.ArgumentParser:
    parser = actions.add_parser(action, help=text)
    parser.add_argument("name", metavar="NAME", help=name)
    return parser


def _add_alias(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    alias = actions.add_parser("alias", help="let an alias stand for an adapter; without arguments, list all")
    alias.add_argument("alias", nargs="?", metavar="ALIAS")
    target = alias.add_mutually_exclusive_group()
    target.add_argument("name", nargs="?", metavar="NAME", help="the adapter that it stands for from now on")
    target.add_argument("--delete", action="store_true", help="forget the alias")
    return alias
