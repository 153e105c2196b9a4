"""Counters of a replica, for Prometheus."""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from den.runs.predict import Prediction
from den.serve.batcher import Answer

MILLISECONDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one replica, in a registry of its own.

    Structures are counted by block and level: of whole ones there are too many for a label.

    Args:
        full: FLOPs of the full structure.
        queue: the items that wait, when it is asked.
        inside: the requests that are held, when it is asked.
    """

    def __init__(self, full: float, queue: Callable[[], int], inside: Callable[[], int]) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("den_requests", "Requests that were answered.", ["status"], registry=own)
        self.images = Counter("den_images", "Pictures that were classified.", ["task"], registry=own)
        self.levels = Counter(
            "den_levels", "Pictures that ran a block at a level.", ["task", "block", "level"], registry=own
        )
        self.flops = Counter("den_flops", "FLOPs of the structures in use.", ["task"], registry=own)
        self.full = Counter("den_full_flops", "FLOPs that the full structure would have taken.", ["task"], registry=own)
        self.batch = Histogram("den_batch_milliseconds", "Time of a batch.", buckets=MILLISECONDS, registry=own)
        self.size = Histogram("den_batch_images", "Pictures of a batch.", buckets=IMAGES, registry=own)
        self.waited = Histogram(
            "den_queue_milliseconds", "Time of a picture in the queue.", buckets=MILLISECONDS, registry=own
        )
        saved = Gauge(
            "den_flops_saved_ratio", "Share of the full structure's FLOPs that was saved so far.", registry=own
        )
        saved.set_function(self._saved)
        Gauge("den_queue_length", "Pictures that wait.", registry=own).set_function(queue)
        Gauge("den_requests_held", "Requests that are read, wait or are computed.", registry=own).set_function(inside)
        self._full, self._used, self._whole = full, 0.0, 0.0

    def batched(self, seconds: float, predictions: Iterable[Prediction]) -> None:
        """Count a batch."""
        found = list(predictions)
        self.batch.observe(1e3 * seconds)
        self.size.observe(len(found))
        for task, count in Tally(each.task for each in found).items():
            used = sum(each.flops for each in found if each.task == task)
            self.images.labels(task).inc(count)
            self.flops.labels(task).inc(used)
            self.full.labels(task).inc(count * self._full)
            self._used, self._whole = self._used + used, self._whole + count * self._full
        levels = Tally((each.task, *place) for each in found for place in enumerate(each.levels))
        for labels, count in levels.items():
            self.levels.labels(*labels).inc(count)

    def answered(self, answers: Iterable[Answer[Prediction]]) -> None:
        """Count the time that pictures waited."""
        for answer in answers:
            self.waited.observe(1e3 * answer.waited)

    def text(self) -> str:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()

    def _saved(self) -> float:
        return 1 - self._used / self._whole if self._whole else 0.0


def merged(texts: Mapping[str, str]) -> str:
    """The metrics of several replicas as one text: those of replica `name` have the label replica="name"."""
    families: dict[str, Metric] = {}
    for name, text in texts.items():
        for family in text_string_to_metric_families(text):
            own = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                own.add_sample(sample.name, {**sample.labels, "replica": name}, sample.value)
    return generate_latest(_Families(list(families.values()))).decode()


class _Families(CollectorRegistry):
    """A registry of metrics that were collected elsewhere."""

    def __init__(self, families: list[Metric]) -> None:
        super().__init__()
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
