"""What the API counts, for Prometheus."""

from collections.abc import Callable, Iterable
from typing import Any

from bytelm.extras import import_extra
from bytelm.serving.scheduler import Counts


class Metrics:
    """Counters of one server, in a registry of their own.

    `counts` says how many texts there are, `scoring` how many prompts are scored or wait for it,
    `device_bytes` what is in use on the device.

    Raises `ValueError` if prometheus_client is not installed.
    """

    def __init__(
        self,
        slots: int,
        counts: Callable[[], Counts],
        scoring: Callable[[], int],
        device_bytes: Callable[[], int],
    ) -> None:
        p = self._library = import_extra("prometheus_client", "api")
        p.disable_created_metrics()
        self._registry = p.CollectorRegistry()
        to = {"namespace": "bytelm", "registry": self._registry}
        self.requests = p.Counter("requests", "Requests by status", ["status"], **to)
        self.texts = p.Counter("texts", "Texts by why they ended", ["end"], **to)
        self.prompt_bytes = p.Counter("prompt_bytes", "Bytes of prompts that were accepted", **to)
        self.generated_bytes = p.Counter("generated_bytes", "Bytes that were generated", **to)
        self.first_byte = p.Histogram("first_byte_seconds", "Until a text's first bytes", **to)
        p.Gauge("slots", "Texts that can be written at once", **to).set(slots)
        active = p.Gauge("active_texts", "Texts that are being written", **to)
        waiting = p.Gauge("waiting_texts", "Texts that wait for a slot", **to)
        active.set_function(lambda: counts().active)
        waiting.set_function(lambda: counts().waiting)
        scored = p.Gauge("scoring_prompts", "Prompts that are scored, or wait for it", **to)
        scored.set_function(scoring)
        self._registry.register(
            _Advances(import_extra("prometheus_client.core", "api").CounterMetricFamily, counts)
        )
        in_use = p.Gauge("device_bytes", "Memory in use on the device", **to)
        in_use.set_function(device_bytes)
        for status in ("200", "400", "429", "500"):
            self.requests.labels(status)
        for end in ("stop", "length", "cancelled", "error"):
            self.texts.labels(end)

    def text(self) -> bytes:
        """Everything in Prometheus' format."""
        return self._library.generate_latest(self._registry)

    @property
    def content_type(self) -> str:
        """Of `text`."""
        return self._library.CONTENT_TYPE_PLAIN_0_0_4


class _Advances:
    """A collector of the advances and their seconds, which the scheduler counts itself."""

    def __init__(self, family: Any, counts: Callable[[], Counts]) -> None:
        self._family, self._counts = family, counts

    def collect(self) -> Iterable[Any]:
        """Both counters."""
        counts = self._counts()
        yield self._family("bytelm_advances", "Advances of the batch", value=counts.advances)
        seconds = self._family("bytelm_engine_seconds", "Of the model's thread", labels=["work"])
        for work, value in counts.seconds.items():
            seconds.add_metric([work], value)
        yield seconds
