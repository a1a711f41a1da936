"""`llama3v serve`: open a model, check that it sees, and answer until told to end."""

import functools
import importlib.util
import logging
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from llama3v.config import ServeConfig
from llama3v.errors import ConfigError

if TYPE_CHECKING:
    import uvicorn

    from llama3v.engines.cached import CachedEngine
    from llama3v.server.gateway import Gateway
    from llama3v.server.keys import Key
    from llama3v.server.vision_cache import Store

_EXTRA = ("fastapi", "uvicorn", "prometheus_client", "httpx2")
_SWITCH_SECONDS = 0.0005  # a worker's Python code holds the event loop up for no longer (Python's own: 0.005)
_BUDGET_BODIES = 4  # so many of the largest requests may be held at the same time


def serve(config: ServeConfig, engine: "CachedEngine | None" = None) -> dict[str, Any]:
    """Serve until SIGTERM or SIGINT; requests that are in work then have `drain_seconds` to end.

    Args:
        engine: runs the model; default: the one of `config.model`.

    Returns {"verb", "model", "address"}, or {"verb", "key"} with `make_key`. Raises CheckpointError, and ConfigError,
    among others where the model does not see (canary.py).
    """
    absent = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(f"serving needs an extra (there is no module {absent[0]}): pip install 'llama3v[serve]'")
    if config.make_key is not None:
        return _make_key(config.make_key)
    from llama3v.server.settings import read_settings

    config, keys = read_settings(config)
    listener = _listen(config)  # before the model is loaded: a port that is taken is told at once
    with listener:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
        gateway = open_gateway(config, keys, engine or _open_engine(config))
        return _run(gateway, listener)


def open_gateway(config: ServeConfig, keys: "list[Key]", engine: "CachedEngine") -> "Gateway":
    """Everything but the socket: checked by the canary and, if asked for, warmed up."""
    from llama3v.server.body import Budget
    from llama3v.server.canary import require_sight, warm_up
    from llama3v.server.fetch import Fetcher
    from llama3v.server.formats import Formats
    from llama3v.server.gateway import Gateway
    from llama3v.server.keys import KeyRing
    from llama3v.server.metrics import Metrics
    from llama3v.server.model import ServedModel
    from llama3v.server.pictures import Pictures
    from llama3v.server.scheduler import Scheduler
    from llama3v.server.vision_cache import VisionCache

    require_sight(engine)
    if config.warmup:
        warm_up(engine)
    cache = VisionCache(config.vision_cache_mb * 2**20, _open_store(config, engine))
    gateway = Gateway(
        config=config,
        model=ServedModel(engine, config.name or Path(config.model).name, cache),
        scheduler=Scheduler(workers=engine.conversations, places=config.queue),
        pictures=Pictures(
            tile_size=engine.tile_size,
            max_tiles=engine.max_tiles,
            workers=config.image_workers,
            fetch=Fetcher() if config.remote_images else None,
        ),
        keys=KeyRing(keys),
        metrics=Metrics(),
        formats=Formats(),
        budget=Budget(_BUDGET_BODIES * config.max_body_mb * 2**20),
        started=int(time.time()),
        ready=True,
    )
    gateway.metrics.watch(gateway.scheduler, cache, gateway.budget)
    return gateway


def _open_store(config: ServeConfig, engine: "CachedEngine") -> "Store | None":
    if config.vision_cache_dir is None:
        return None
    from llama3v.model.tiles import make_tiles
    from llama3v.server.canary import known_pictures
    from llama3v.server.model import as_array
    from llama3v.server.vision_store import VisionStore, fingerprint_of

    tile = make_tiles(known_pictures(engine.tile_size)[0], engine.tile_size, 0)
    fingerprint = fingerprint_of(engine.name, as_array(engine.visual_tokens(tile)))
    return VisionStore(config.vision_cache_dir, fingerprint, config.vision_cache_disk_bytes)


def _run(gateway: "Gateway", listener: socket.socket) -> dict[str, Any]:
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            gateway.ready = False  # /ready says so while connections drain
            super().handle_exit(sig, frame)
            self._captured_signals.clear()  # uvicorn would raise it again: to end so is no failure

    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(
        f"llama3v serves {gateway.model.name} at {address} (the page), {address}/v1 (the API)",
        file=sys.stderr,
        flush=True,
    )
    sys.setswitchinterval(_SWITCH_SECONDS)
    Server(http_settings(gateway)).run(sockets=[listener])
    return {"verb": "serve", "model": gateway.config.model, "address": address}


def http_settings(gateway: "Gateway") -> "uvicorn.Config":
    """How uvicorn serves a gateway."""
    import uvicorn

    from llama3v.server.app import create_app
    from llama3v.server.connections import Connection

    return uvicorn.Config(
        create_app(gateway),
        http=functools.partial(Connection, most=gateway.config.max_connections),  # type: ignore[arg-type]
        log_level="warning",
        access_log=False,  # it would write what clients make up
        server_header=False,
        proxy_headers=False,  # who asks is who connects
        ws="none",
        timeout_graceful_shutdown=round(gateway.config.drain_seconds),
        timeout_keep_alive=15,
    )


def _listen(config: ServeConfig) -> socket.socket:
    host = config.host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port} ({error.strerror or error}); give another --port or --host"
        ) from error
    return listener


def _open_engine(config: ServeConfig) -> "CachedEngine":
    from llama3v.engines.cached import CachedEngine
    from llama3v.engines.choose import open_engine

    choice = open_engine(config.model, config, conversations=config.parallel)
    if choice.reason:
        print(choice.reason, file=sys.stderr)
    assert isinstance(choice.engine, CachedEngine), "all engines of choose.py are"
    return choice.engine


def _make_key(name: str) -> dict[str, Any]:
    from llama3v.server.keys import new_key

    key, lines = new_key(name)
    print("The key, which is shown only now:", file=sys.stderr)
    print(key)
    print(f"Put this into the file that you give as --config:\n\n{lines}", file=sys.stderr)
    return {"verb": "serve", "key": name}
