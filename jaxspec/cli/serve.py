"""`serve`, from a shell."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxspec.checkpoints import Weights
from jaxspec.cli.options import DrafterOptions, Dtype, chosen_dtype, target_name


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a model over an OpenAI-compatible HTTP API, with speculative decoding.

    Needs the extra 'serve'. It answers as soon as one request at a time can be; the programs of
    larger batches are compiled beside it, and for the adaptive schedule the time of a round of
    every size is measured while there are no requests, once for a setup.

    Examples:
      python -m jaxspec serve
      python -m jaxspec serve --drafter run/drafter --tree path_conditioned --budget 16
      curl localhost:8000/v1/completions -H "Content-Type: application/json" \\
          -d '{"prompt": "Once upon a time", "max_tokens": 32}'
    """

    drafter: Annotated[DrafterOptions, tyro.conf.arg(name="")] = DrafterOptions()
    target: str | None = None
    """Name in the catalog, GGUF file, Hugging Face folder, or hub name. By default what the
    drafter's files name (speculators' format), else smollm2-135m."""
    dtype: Dtype = "auto"
    """Dtype of weights and cache; auto is the fastest here, and says which that is."""
    weights: Weights = "dequantised"
    """Of a target in fp8: dequantised to --dtype, or stored, in 8 bits with their scales, which
    halves memory and, on a GPU, what a step reads."""
    served_model_name: tuple[str, ...] = ()
    """Model names that requests may use; responses carry the first. By default --target and its
    last part."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """0 picks a free port."""
    slots: int = 8
    """Requests decoded together."""
    room: int = 1024
    """Maximum tokens of prompt and answer together. Caches hold up to (1.5 slots + 1) times as
    many."""
    queue: int = 64
    """Maximum waiting requests; further ones get status 429."""
    schedule: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: a round verifies the nodes, of all requests, that are worth their time; fixed:
    every request has the whole budget."""
    max_nodes: int = 128
    """Nodes of all requests in one adaptive round."""
    chunk: int = 64
    """Prompt tokens per prefill chunk; running requests wait for one chunk at a time."""
    rounds: int = 1
    """Decode rounds between scheduling steps."""
    prefix_cache_mb: float | None = None
    """MiB for prefixes of prompts, which are then not run again; 0 keeps none. By default half
    of what the rows of all slots take."""
    top_logprobs: int = 20
    """Alternatives whose log-probabilities requests may ask for; 0 has none to give."""
    rejection: bool = False
    """Draw chains from a trained drafter and verify them by rejection sampling."""
    curve: Path | None = None
    """File of step times: read if it is there, written once they are measured. By default they
    are kept in the cache."""
    api_key: str | None = None
    """What requests must bring, as Authorization: Bearer KEY; by default the environment's
    JAXSPEC_API_KEY, else none. /health and /ready need none."""
    open_metrics: bool = False
    """/metrics needs no key."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may use the server in a browser, as https://chat.example."""
    drain_seconds: float = 30.0
    """Seconds that answers may take to end after SIGTERM; what is left ends with an error."""
    body_bytes: int = 1 << 20
    """Largest body of a request."""
    connections: int = 256

    def run(self) -> int:
        self._check()
        programs, start = kept_programs(), self._start()
        programs.expect(start)
        try:
            from jaxspec.serving.access import LOOPBACK, Access
            from jaxspec.serving.connections import Limits
            from jaxspec.serving.server import check_servable, listen, server
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{error.name} is not installed: pip install starlette uvicorn "
                "prometheus-client llguidance"
            ) from error
        import jaxspec
        from jaxspec.decoding.curve import Curve
        from jaxspec.kept_curves import keep_curve, kept_curve
        from jaxspec.serving.runner import Runner

        limits = Limits(body_bytes=self.body_bytes, connections=self.connections)
        key = self.api_key if self.api_key is not None else os.environ.get("JAXSPEC_API_KEY")
        access = Access(key, self.open_metrics, self.cors_origins)
        if key is None and self.host not in LOOPBACK:
            print(
                f"warning: --host {self.host} may be reached by others, and they need no key; "
                "set --api-key, or put something in front that asks for one",
                file=sys.stderr,
            )
        bound = listen(self.host, self.port)
        stored = self.curve is not None and self.curve.exists()
        curve = Curve.load(self.curve) if stored else None
        jaxspec.enable_compilation_cache()
        target_path = target_name(self.target, self.drafter.drafter)
        target = jaxspec.load_target(
            target_path, dtype=chosen_dtype(self.dtype), weights=self.weights
        )
        check_servable(target)
        engine = self._engine(target, curve, programs)
        if self.curve is None and (kept := kept_curve(engine.setup())) is not None:
            engine.ready.use(kept)
        print("compiling …", flush=True)
        engine.open()
        programs.remember(start)
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
        if self.host in LOOPBACK or key is not None:
            print(f"watch its trees on http://{host}:{port}/", flush=True)
        http.run([bound])
        return 0

    def _save(self, curve) -> None:
        curve.save(self.curve)

    def _check(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port is {self.port}; expected 0 … 65535")
        if not self.drain_seconds >= 0:
            raise ValueError(f"--drain-seconds is {self.drain_seconds}; expected at least 0")

    def _start(self) -> str:
        """Which programs are needed follows from this, as long as nothing else changes."""
        return repr(dataclasses.replace(self, api_key=None, port=0))

    def _engine(self, target, curve, kept):
        """The engine that the options describe, not yet warmed up."""
        from jaxspec.decoding.schedule import Adaptive, Fixed
        from jaxspec.drafters.joined import with_survival
        from jaxspec.serving.config import EngineConfig
        from jaxspec.serving.engine import Engine

        drafter = with_survival(self.drafter.load(target, chain=self.rejection))
        adaptive = self.schedule == "adaptive" and drafter.drafter.size > 1
        config = EngineConfig(
            slots=self.slots,
            room=self.room,
            queue=self.queue,
            schedule=Adaptive() if adaptive else Fixed(),
            budget=None if adaptive else min(self.drafter.budget, drafter.drafter.size),
            max_nodes=self.max_nodes,
            chunk=self.chunk,
            rounds=self.rounds,
            rejection=self.rejection,
            top_logprobs=self.top_logprobs,
            prefix_cache_mb=self.prefix_cache_mb,
        )
        return Engine(target, drafter, config, curve=curve, kept=kept)

    def _names(self, target: str) -> tuple[str, ...]:
        last = Path(target).absolute().name.removesuffix(".gguf")
        # A path tells where files lie, which is nobody's business.
        first = last if Path(target).exists() else target
        return self.served_model_name or tuple(dict.fromkeys((first, target, last)))


def kept_programs():
    """Where an engine's programs are kept for the next start; nowhere without a cache."""
    from jaxspec.checkpoints import catalog
    from jaxspec.dtypes import cpu_id
    from jaxspec.serving.kept_programs import KeptPrograms

    try:
        folder = catalog.cache_dir() / "programs"
    except OSError:  # `enable_compilation_cache` has warned
        folder = None
    return KeptPrograms(folder, cpu_id())
