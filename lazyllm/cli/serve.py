"""The command serve: a model for many, over HTTP."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lazyllm.cli.console import device_of, errors_as_lines, load_or_refuse
from lazyllm.cli.serve_replicas import engine_on_ray
from lazyllm.config import LazyConfig
from lazyllm.errors import InputError
from lazyllm.evaluation.data import PACKAGED, model_source, quiet_loading
from lazyllm.extras import needed
from lazyllm.pipeline import LazyPipeline

KEY_VARIABLE = "LAZYLLM_API_KEY"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
GIBIBYTE = 2**30


@errors_as_lines()
def serve(
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file, or the packaged SmolLM2.")] = PACKAGED,
    preset: Annotated[
        list[str] | None, typer.Option(help="A preset or the path of a configuration; the first is the default.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar=KEY_VARIABLE, help="A key that lets clients in; may be repeated.")
    ] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Let everybody in, also from other machines.")] = False,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin of pages that may ask from a browser; may be repeated.")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 16 * 2**20,
    request_timeout: Annotated[float, typer.Option(min=0.001, help="Most seconds for a request.")] = 600.0,
    max_running: Annotated[int, typer.Option(min=1, help="Most replies that are made at once.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=0, help="Most requests that wait.")] = 64,
    prefix_bytes: Annotated[int, typer.Option(min=0, help="Bytes of what is kept of earlier prompts.")] = GIBIBYTE,
    document_bytes: Annotated[int, typer.Option(min=0, help="Bytes of loaded documents.")] = GIBIBYTE,
    piece: Annotated[int, typer.Option(min=1, help="Tokens of a prefill between two steps of running replies.")] = 512,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that running replies get when the server ends.")] = 30.0,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file inside the folder or repository.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights.")] = "auto",
    weights: Annotated[str | None, typer.Option(help="Bits of the linear layers' weights: int4 or int8.")] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")] = "cpu",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    replicas: Annotated[int, typer.Option(min=1, help="Engines, each a process with a model of its own, on Ray.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of the Ray cluster whose machines run the replicas.")] = None,
    replica_cpus: Annotated[float, typer.Option(min=0, help="CPUs that a replica takes.")] = 1.0,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="Least level of what is logged.")
    ] = "info",
) -> None:
    """Serves a model over HTTP, as OpenAI's API has it: many clients, one batch."""
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        needed(module, what="the command serve", extra="serve")
    from lazyllm.serving.engine import Engine, EngineLimits
    from lazyllm.serving.http.log import log_to_stderr
    from lazyllm.serving.http.server import Server, listen, run_server
    from lazyllm.serving.http.settings import ServerSettings

    # what cannot be is refused before time is spent on a model
    configs, on_ray = named_configs(preset or ["recommended"]), replicas > 1 or ray is not None
    place = None if on_ray else device_of(device)
    settings = ServerSettings(
        name=model_name(model, gguf_file),
        keys=tuple(api_key or ()),
        hosts=trusted_names(host, open_to_all=bool(api_key) or no_key),
        cors_origins=tuple(cors_origin or ()),
        max_body_bytes=max_body,
        request_seconds=request_timeout,
    )
    limits = EngineLimits(max_running, max_waiting, piece, prefix_bytes, document_bytes)
    with listen(host, port) as listener, ExitStack() as held:
        source = model_source(model)
        engine: Any
        if on_ray:
            engine = held.enter_context(
                engine_on_ray(
                    source, configs, limits, replicas=replicas, address=ray, cpus=replica_cpus, device=device,
                    gguf_file=gguf_file, dtype=dtype, weights=weights, trust_remote_code=trust_remote_code,
                )
            )  # fmt: skip
        else:
            with quiet_loading():
                loaded = load_or_refuse(
                    source, gguf_file, dtype, weights, device=place, trust_remote_code=trust_remote_code
                )
            engine = Engine({name: LazyPipeline.from_config(one, *loaded) for name, one in configs.items()}, limits)
        address = f"http://{_in_url(host)}:{listener.getsockname()[1]}"

        def announce() -> None:
            typer.echo(f"{settings.name} answers at {address} under {', '.join(configs)}; Ctrl-C ends it")

        log_to_stderr(log_level)
        run_server(Server(engine, settings, drain_seconds=drain, on_start=announce), listener)


def named_configs(presets: Sequence[str]) -> dict[str, LazyConfig]:
    """Configurations by what clients call them: presets by name, files without folder and ending.

    Raises:
        ConfigError: when there is no such preset or file.
        InputError: when two have the same name.
    """
    configs: dict[str, LazyConfig] = {}
    for preset in presets:
        name = Path(preset).stem
        if name in configs:
            raise InputError(f"two policies are called {name!r}; rename a file")
        configs[name] = LazyConfig.preset(preset)
    return configs


def model_name(model: str, gguf_file: str | None) -> str:
    """What clients call a model: the last part of where it is found, without `.gguf`."""
    path = Path(gguf_file or model_source(model))
    return path.stem if path.suffix == ".gguf" else path.resolve().name


def trusted_names(host: str, *, open_to_all: bool) -> tuple[str, ...]:
    """Names that clients may call the server by: those of this machine alone where it asks for no key, () = any.

    Raises:
        InputError: when it would listen to other machines so.
    """
    if open_to_all:
        return ()
    if not is_loopback(host):
        raise InputError(
            f"on {host} other machines can ask this server: give --api-key (or {KEY_VARIABLE}), or say --no-key"
        )
    return tuple(dict.fromkeys([*LOOPBACK_NAMES, host.lower()]))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
