"""The latest figures of a run for Prometheus, over HTTP: `output.metrics_port`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from dlora.errors import UsageError

PREFIX = "dlora_"
HELP = {  # figures whose names do not say enough; by the keys of metrics.jsonl
    "step": "optimizer steps that are done",
    "loss": "mean cross entropy of the step's target tokens",
    "eval_loss": "the same over the held-out data, when it was last evaluated",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate of the step",
    "tokens": "target tokens of the step, all ranks",
    "all_tokens": "tokens of the step without padding, all ranks",
    "peak_memory_bytes": "highest use of memory over all ranks",
    "wire_bytes": "bytes that rank 0 sent in the step's collectives",
    "mfu": "share of the devices' peak that the model's operations take",
}


class MetricsEndpoint:
    """Serves gauges, one for each figure, in Prometheus's text format or as OpenMetrics.

    A scrape reads the latest value of each; what asks decides the format (`Accept`).

    Args:
        port: of all interfaces; 0: any that is free.
        about: labels of `dlora_run_info`.

    Raises:
        UsageError: the port is taken, or may not be opened.
    """

    def __init__(self, port: int, about: Mapping[str, str]) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._about, self._lock = dict(about), threading.Lock()
        self._latest: dict[str, float] = {}
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, registry=registry)
        except OSError as error:
            said = error.strerror or error
            raise UsageError(f"output.metrics_port: {port} cannot be opened: {said}") from error
        self.port: int = self._server.server_port

    def write(self, record: Mapping[str, Any]) -> None:
        """Take the numbers of a line of the metrics as the latest ones."""
        numbers = {k: float(v) for k, v in record.items() if isinstance(v, (int, float))}
        with self._lock:
            self._latest |= numbers

    def collect(self) -> Iterator[Any]:
        """What a scrape gets; called by prometheus_client."""
        from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

        yield InfoMetricFamily(f"{PREFIX}run", "the run", self._about)
        with self._lock:
            latest = dict(self._latest)
        for name, value in latest.items():
            text = HELP.get(name, name.replace("_", " "))
            yield GaugeMetricFamily(PREFIX + name, text, value)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
