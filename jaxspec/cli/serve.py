"""`serve`, from a shell."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxspec.checkpoints import Weights
from jaxspec.cli.options import (
    DrafterOptions,
    Dtype,
    TargetName,
    check_writable,
    chosen_dtype,
    target_name,
)


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a model over an OpenAI-compatible HTTP API, with speculative decoding.

    Needs the extra 'serve'. The server answers as soon as the programs for one request are
    compiled, and compiles those for larger batches meanwhile. The adaptive schedule then
    measures, while idle, how long rounds of each size take; the times are kept.

    A request without a temperature is sampled at 1, as in OpenAI's API; 0 is greedy.

    Examples:
      python -m jaxspec serve
      python -m jaxspec serve --drafter run/drafter --tree path_conditioned --budget 16
      curl localhost:8000/v1/completions -H "Content-Type: application/json" \\
          -d '{"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0}'
    """

    drafter: Annotated[DrafterOptions, tyro.conf.arg(name="")] = DrafterOptions()
    target: TargetName = None
    dtype: Dtype = "auto"
    """Dtype of weights and caches; see `generate`."""
    weights: Weights = "dequantised"
    """How to hold an fp8 target's weights: dequantised to --dtype, or stored in 8 bits with
    their scales, which halves memory and, on a GPU, the bytes read per step."""
    served_model_name: tuple[str, ...] = ()
    """Model names that requests may use; responses carry the first. Default: --target, and its
    last part."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    slots: int = 8
    """Maximum requests decoded together."""
    room: int = 1024
    """Maximum tokens of prompt and answer together. Caches hold up to (1.5 slots + 1) times as
    many."""
    queue: int = 64
    """Maximum waiting requests; further ones get status 429."""
    schedule: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: each round verifies the nodes, over all requests, that pay for their time.
    fixed: each round verifies every request's whole budget."""
    max_nodes: int = 128
    """Maximum nodes of all requests in one adaptive round."""
    chunk: int = 64
    """Prompt tokens per prefill chunk. Running requests wait for one chunk at a time, so
    smaller chunks delay them less."""
    rounds: int = 1
    """Decode rounds between scheduling steps."""
    prefix_cache_mb: float | None = None
    """MiB of cache for prompt prefixes, so that repeated ones are not computed again; 0 keeps
    none. Default: half of the memory of all slots' caches."""
    top_logprobs: int = 20
    """Maximum alternative tokens per position that a request may ask log-probabilities for; 0
    turns log-probabilities off."""
    rejection: bool = False
    """Sample chains from a trained drafter and verify them by rejection sampling."""
    curve: Path | None = None
    """File of measured round times: read if it exists, else written after measuring. By
    default they are kept in the cache folder."""
    api_key: str | None = None
    """Key that requests must send, as Authorization: Bearer KEY; /health and /ready need none.
    Default: the environment variable JAXSPEC_API_KEY, else no key."""
    open_metrics: bool = False
    """Serve /metrics without a key."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may call the server from a browser, such as
    https://chat.example."""
    drain_seconds: float = 30.0
    """Seconds that running answers get to finish after SIGTERM; then they end with an error."""
    body_bytes: int = 1 << 20
    """Maximum bytes of a request body."""
    connections: int = 256
    """Maximum open connections; further requests get status 503, except /health."""

    def run(self) -> int:
        self._check()
        programs, start = kept_programs(), self._start()
        programs.expect(start)
        try:
            from jaxspec.serving.access import LOOPBACK
            from jaxspec.serving.connections import Limits
            from jaxspec.serving.server import bind, check_servable, listen, server
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{error.name} is not installed: pip install starlette uvicorn "
                "prometheus-client llguidance"
            ) from error
        import jaxspec
        from jaxspec import checkpoints
        from jaxspec.decoding.curve import Curve
        from jaxspec.kept_curves import keep_curve, kept_curve
        from jaxspec.serving.runner import Runner

        limits = Limits(body_bytes=self.body_bytes, connections=self.connections)
        access, config = self._access(), self._config()
        target_path = target_name(self.target, self.drafter.drafter)
        self.drafter.check(target_path, rejection=self.rejection)
        bound = bind(self.host, self.port)
        stored = self.curve is not None and self.curve.exists()
        curve = Curve.load(self.curve) if stored else None
        config.check_room(checkpoints.read_config(target_path))
        jaxspec.enable_compilation_cache()
        target = jaxspec.load_target(
            target_path, dtype=chosen_dtype(self.dtype), weights=self.weights
        )
        check_servable(target)
        engine = self._engine(target, config, curve, programs)
        if self.curve is None and (kept := kept_curve(engine.setup())) is not None:
            engine.ready.use(kept)
        print("compiling …", flush=True)
        engine.open()
        programs.remember(start)
        listen(bound)
        host, port = bound.getsockname()[:2]
        names = self._names(target_path)
        http = server(
            Runner(engine, keep_curve if self.curve is None else self._save),
            names=names,
            host=self.host,
            port=port,
            limits=limits,
            access=access,
            drain_seconds=self.drain_seconds,
        )
        print(f"serving {names[0]} on http://{host}:{port}/v1", flush=True)
        if self.host in LOOPBACK or access.key is not None:
            print(f"watch its trees on http://{host}:{port}/", flush=True)
        http.run([bound])
        return 0

    def _save(self, curve) -> None:
        curve.save(self.curve)

    def _check(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port is {self.port}; expected 0 … 65535")
        if not 0 <= self.drain_seconds < math.inf:
            raise ValueError(
                f"--drain-seconds is {self.drain_seconds}; expected a number of at least 0"
            )
        if self.curve is not None and not os.path.exists(self.curve):  # else it is read
            check_writable("curve", self.curve)

    def _start(self) -> str:
        """Identifies the programs that this start needs."""
        return repr(dataclasses.replace(self, api_key=None, port=0))

    def _engine(self, target, config, curve, kept):
        """The engine of these options, not yet warmed up."""
        from jaxspec.decoding.schedule import Adaptive, Fixed
        from jaxspec.drafters.joined import with_survival
        from jaxspec.serving.engine import Engine

        drafter = with_survival(self.drafter.load(target, chain=self.rejection))
        adaptive = self.schedule == "adaptive" and drafter.drafter.size > 1
        config = dataclasses.replace(
            config,
            schedule=Adaptive() if adaptive else Fixed(),
            budget=None if adaptive else min(self.drafter.budget, drafter.drafter.size),
        )
        return Engine(target, drafter, config, curve=curve, kept=kept)

    def _access(self):
        """Who may use the server; warns if everyone may."""
        from jaxspec.serving.access import LOOPBACK, Access

        key = self.api_key if self.api_key is not None else os.environ.get("JAXSPEC_API_KEY")
        access = Access(key, self.open_metrics, self.cors_origins)
        if key is None and self.host not in LOOPBACK:
            print(
                f"warning: --host {self.host} may be reached by others without a key; set "
                "--api-key, or put a proxy in front that asks for one",
                file=sys.stderr,
            )
        return access

    def _config(self):
        """The engine's limits, without those that depend on the drafter."""
        from jaxspec.serving.config import EngineConfig

        return EngineConfig(
            slots=self.slots,
            room=self.room,
            queue=self.queue,
            max_nodes=self.max_nodes,
            chunk=self.chunk,
            rounds=self.rounds,
            rejection=self.rejection,
            top_logprobs=self.top_logprobs,
            prefix_cache_mb=self.prefix_cache_mb,
        )

    def _names(self, target: str) -> tuple[str, ...]:
        last = Path(target).absolute().name.removesuffix(".gguf")
        # Clients need not learn where the server's files lie.
        first = last if Path(target).exists() else target
        return self.served_model_name or tuple(dict.fromkeys((first, target, last)))


def kept_programs():
    """The store of an engine's programs for the next start; None without a cache folder."""
    from jaxspec.checkpoints import catalog
    from jaxspec.dtypes import cpu_id
    from jaxspec.serving.kept_programs import KeptPrograms

    try:
        folder = catalog.cache_dir() / "programs"
    except OSError:  # `enable_compilation_cache` has warned
        folder = None
    return KeptPrograms(folder, cpu_id())
