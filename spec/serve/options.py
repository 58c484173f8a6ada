"""The command line of ``python -m spec.serve`` and its ``--config`` files: one set of names for both."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from spec import loading

_SECRETS = {"api_key": "SPEC_API_KEY", "admin_key": "SPEC_ADMIN_KEY"}  # never in a config file's place: see parse
# What only our own engine and server have; with --backend vllm they are refused, not dropped.
TORCH_ONLY = (
    "admin_key", "allowed_draft", "allowed_host", "audit_at_start", "audit_share", "cache_tokens",
    "default_max_tokens", "drafting", "draft_quantization", "log_text", "max_body", "max_waiting", "mode",
    "quantization", "request_timeout",
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """Every option with its default in the help."""
    parser = argparse.ArgumentParser(
        prog="python -m spec.serve",
        description="OpenAI-compatible server whose answers are the target's, faster.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML with these options; the command line has the last word")
    _add_models(parser.add_argument_group("models"))
    _add_limits(parser.add_argument_group("limits"))
    _add_access(parser.add_argument_group("access"))
    return parser


def _add_models(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--target", metavar="DIR", help="model directory or hub id")
    add("--draft", metavar="DIR", help=f"{loading.DRAFT_HELP}; without it, no drafts")
    add("--served-model-name", metavar="NAME", help="in /v1/models; default: the target's last path component")
    add("--backend", choices=("auto", "torch", "vllm"), default="auto", help="torch: this engine; vllm: vLLM's server; "
        "auto: the fastest that passes its self-test, tried once and remembered")  # fmt: skip
    add("--retry-backends", action="store_true", help="with --backend auto: try them again")
    add("--draft-length", default="auto", metavar="K|auto", help="tokens to draft a step; auto adapts to what pays")
    add("--drafting", choices=("probabilistic", "greedy"), default="probabilistic", help="how a draft model drafts")
    add("--draft-quantization", choices=("auto", "none", "int8", "int4"), default="auto", help="of a draft's weights")
    add("--mode", choices=("block", "token"), default="block", help="verification")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the weights")
    add("--audit-at-start", type=int, default=512, metavar="N",
        help="sampled tokens audited before serving, and before a new draft takes over; 0: none")  # fmt: skip
    add("--audit-share", type=float, default=0.01, metavar="SHARE",
        help="of the requests to audit while serving; 0: none")  # fmt: skip
    add("--quantization", choices=("none", "int8", "int4"), default="none", help="of the target: another target")
    add("--device", help="cpu or cuda; default: a GPU where there is one")


def _add_limits(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--max-running", type=int, default=64, help="sequences that run at once")
    add("--max-waiting", type=int, default=256, help="sequences that may wait; beyond, answers are 429")
    add("--max-model-len", type=int, help="tokens of prompt and output; default: the model's, if the cache has them")
    add("--cache-tokens", type=int, default=32768, help="of the KV cache, all sequences together")
    add("--default-max-tokens", type=int, default=1024, help="of a chat that names no max_tokens")
    add("--max-body", type=int, default=4 * 2**20, help="bytes of a request")
    add("--request-timeout", type=float, default=600, help="seconds from queueing to the last token")
    add("--drain-timeout", type=int, default=30, help="seconds running requests get after SIGTERM")


def _add_access(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to bind; 0.0.0.0 for all")
    add("--port", type=int, default=8000, help="0: any free one")
    add("--api-key", help="clients must send it; default: $SPEC_API_KEY, else no key")
    add("--admin-key", help="for /admin, where drafts are swapped; default: $SPEC_ADMIN_KEY, else /admin is closed")
    add("--allowed-draft", action="append", default=[], metavar="ID",
        help="hub id that /admin may load, besides directories and the first draft; may be repeated")  # fmt: skip
    add("--cors-origin", action="append", default=[], metavar="ORIGIN", help="let this web origin in; may be repeated")
    add("--allowed-host", action="append", default=[], metavar="HOST",
        help="Host header to accept; default: loopback names when bound to loopback, else all")  # fmt: skip
    add("--log-text", action="store_true", help="prompts and answers in the request log too")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options from config file and command line, keys also from the environment. Mistakes exit with status 2."""
    parser = make_parser()
    config = parser.parse_known_args(arguments)[0].config
    if config is not None:
        _apply(parser, Path(config))
    options = parser.parse_args(arguments)
    if options.target is None:
        parser.error("--target is missing: give a model directory or hub id")
    for name in ("target", "draft"):  # no shell has seen a config file's ~
        if getattr(options, name) is not None:
            setattr(options, name, os.path.expanduser(getattr(options, name)))
    for name, variable in _SECRETS.items():
        if getattr(options, name) is None:
            setattr(options, name, os.environ.get(variable) or None)
    for name, least in (("max_running", 1), ("max_waiting", 0), ("default_max_tokens", 1), ("max_body", 1024),
                        ("request_timeout", 0.001), ("audit_at_start", 0), ("drain_timeout", 0), ("cache_tokens", 16),
                        ("max_model_len", 1)):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if not 0 <= options.audit_share <= 1:
        parser.error(f"--audit-share {options.audit_share}: must be in [0, 1]")
    if not 0 <= options.port < 65536:
        parser.error(f"--port {options.port}: must be in 0..65535")
    return options


def changed(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are not at their defaults, as flags."""
    parser = make_parser()
    return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) != parser.get_default(name)]


def _apply(parser: argparse.ArgumentParser, path: Path) -> None:
    """A config file's values become defaults; they go through the same checks as the command line's."""
    import yaml

    try:
        given = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: {' '.join(str(error).split())}")
    actions = {action.dest: action for action in parser._actions}
    for key, value in given.items() if isinstance(given, dict) else [("the file", None)]:
        name = str(key).replace("-", "_")
        action = actions.get(name)
        if action is None or name in ("config", "help"):
            parser.error(f"--config {path}: unknown option {key!r}; see --help")
        if name in _SECRETS:
            parser.error(f"--config {path}: {key} is a secret: put it into ${_SECRETS[name]}")
        try:
            parser.set_defaults(**{name: _value(action, value)})
        except (ValueError, TypeError):
            parser.error(f"--config {path}: {key}={value!r} is not valid; see --help")


def _value(action: argparse.Action, value: object) -> object:
    if isinstance(action.default, (list, bool)):
        if type(value) is not type(action.default):
            raise ValueError
        return value
    if value is None:
        return None
    converted = action.type(str(value)) if callable(action.type) else str(value)
    if action.choices is not None and converted not in action.choices:
        raise ValueError
    return converted
