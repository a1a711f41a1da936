"""GET /metrics, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llama3v.server.body import Budget
from llama3v.server.responses import Report
from llama3v.server.scheduler import Scheduler
from llama3v.server.vision_cache import VisionCache

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """A registry of its own, so that several servers in one process do not mix."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "llama3v_requests", "Requests, by path and status.", ["path", "status"], registry=registry
        )
        self._failures = Counter(
            "llama3v_stream_failures", "Streams that ended in an error.", ["code"], registry=registry
        )
        self._left = Counter("llama3v_clients_left", "Clients that left before their answer ended.", registry=registry)
        self._prompt = Counter("llama3v_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._new = Counter("llama3v_new_tokens", "Tokens of answers.", registry=registry)
        self._images = Counter("llama3v_images", "Images that were asked about.", registry=registry)
        self._first = Histogram(
            "llama3v_first_text_seconds", "From a request to its first text.", buckets=_SECONDS, registry=registry
        )
        self._phases = {
            phase: Histogram(f"llama3v_{phase}_seconds", f"Seconds of {phase}.", buckets=_SECONDS, registry=registry)
            for phase in ("queue", "vision", "prefill", "decode")
        }

    def watch(self, scheduler: Scheduler, cache: VisionCache, budget: Budget) -> None:
        """Gauges of what is there now."""
        numbers = {
            "llama3v_waiting": ("Requests that wait.", lambda: scheduler.waiting),
            "llama3v_running": ("Requests in work.", lambda: scheduler.running),
            "llama3v_request_bytes": ("Bytes of requests that are held.", lambda: budget.used),
            "llama3v_vision_cache_bytes": ("Visual tokens in memory, in bytes.", lambda: cache.bytes),
            "llama3v_vision_cache_hits_memory": ("Images found in memory.", lambda: cache.hits["memory"]),
            "llama3v_vision_cache_hits_disk": ("Images found on disk.", lambda: cache.hits["disk"]),
            "llama3v_vision_cache_misses": ("Images that the tower looked at.", lambda: cache.misses),
        }
        for name, (words, value) in numbers.items():
            Gauge(name, words, registry=self._registry).set_function(value)

    def responded(self, path: str, status: int) -> None:
        """A response has begun. `path`: a route's, never what a client made up."""
        self._requests.labels(path, str(status)).inc()

    def failed(self, code: str) -> None:
        """A stream ended in an error."""
        self._failures.labels(code).inc()

    def left(self) -> None:
        """A client left."""
        self._left.inc()

    def answered(self, report: Report) -> None:
        """A request was answered to its end."""
        self._prompt.inc(report.prompt_tokens)
        self._new.inc(report.new_tokens)
        self._images.inc(report.timings()["images"])
        self._first.observe(report.first_text_seconds or 0.0)
        self._phases["queue"].observe(report.queue_seconds)
        for phase in ("vision", "prefill", "decode"):
            self._phases[phase].observe(report.seconds(phase))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
