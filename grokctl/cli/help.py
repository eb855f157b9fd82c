"""How the options of a command are listed in its help: in groups, by what they are about."""

from typing import Any, Final

from typer.core import TyperCommand

_OTHER: Final = "Options"
_GROUPS: Final = {
    "Prompt": ("prompt", "prompt_file", "token_ids", "prompts_file", "batch", "text"),
    "Sampling": (
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "seed",
        "min_tokens",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "no_cache_prompt",
    ),
    "Clients": (
        "host",
        "api_key_file",
        "no_auth",
        "allowed_host",
        "cors_origin",
        "tls_cert",
        "tls_key",
        "alias",
        "chat",
        "no_ui",
    ),
    "Load": ("slots", "queue", "request_timeout", "drain", "no_warm_up"),
    _OTHER: (),
    "Hardware": (
        "accelerator",
        "devices",
        "memory",
        "mesh",
        "compute",
        "kv",
        "context",
        "threads",
        "max_memory",
    ),
    "Several hosts": ("coordinator", "num_processes", "process_id", "cluster_timeout"),
    "Network": (
        "peer",
        "mirror",
        "web_seed",
        "tracker",
        "max_download",
        "max_upload",
        "connections",
        "port",
        "bind",
        "proxy",
        "no_dht",
        "no_lsd",
        "no_trackers",
        "stall_timeout",
    ),
    "Output": ("echo", "no_stream", "stats", "as_json", "quiet", "verbose", "home", "help"),
}
"""Parameters by group, in the order of the groups; all others are options of the command itself."""
_FEW: Final = 16
"""So many options need no groups."""
_OF_SERVE: Final = {"port": "Clients", "stall_timeout": "Load"}
"""Parameters of `serve` whose names mean something else elsewhere."""
_SEED: Final = "seed"
"""Of `fetch`, not the random one."""


class GroupedCommand(TyperCommand):
    """A command whose help lists its options in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then each group of options."""
        arguments: list[tuple[str, Any]] = []
        options: list[tuple[str, Any]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                kind = arguments if parameter.param_type_name == "argument" else options
                kind.append((parameter.name, record))
        groups: dict[str, list[Any]] = {"Arguments": [record for _, record in arguments]}
        groups |= {name: [] for name in _GROUPS}
        for name, record in options:
            groups[self._group_of(name) if len(options) > _FEW else _OTHER].append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def _group_of(self, name: str) -> str:
        if name == _SEED and self.name == "fetch":
            return _OTHER
        if self.name == "serve" and name in _OF_SERVE:
            return _OF_SERVE[name]
        return next((group for group, names in _GROUPS.items() if name in names), _OTHER)
