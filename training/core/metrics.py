"""Every Prometheus metric of the server; nothing else declares one."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_LATENCY_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)

OPERATIONS = Counter(
    "tinkercloud_operations_total",
    "Client operations settled, by kind and outcome.",
    ("kind", "outcome"),
)
REPLAYED_OPERATIONS = Counter(
    "tinkercloud_replayed_operations_total",
    "Operations run again to bring a model back after a crash.",
    ("kind",),
)
SNAPSHOTS = Counter(
    "tinkercloud_snapshots_total", "Model snapshots written, by outcome.", ("outcome",)
)
SNAPSHOT_SECONDS = Histogram(
    "tinkercloud_snapshot_seconds",
    "From the capture of a model to its durable snapshot.",
    buckets=_LATENCY_BUCKETS_S,
)
REVIVAL_SECONDS = Histogram(
    "tinkercloud_revival_seconds",
    "Time to load a model's snapshot after a crash.",
    buckets=_LATENCY_BUCKETS_S,
)
ENGINE_DEATHS = Counter(
    "tinkercloud_engine_deaths_total", "Engines that ended while they were needed.", ("cause",)
)
TRAINED_TOKENS = Counter(
    "tinkercloud_trained_tokens_total",
    "Tokens run through forward or forward_backward.",
    ("kind",),
)
SAMPLED_TOKENS = Counter("tinkercloud_sampled_tokens_total", "Tokens generated.")
PROMPT_TOKENS = Counter("tinkercloud_prompt_tokens_total", "Prompt tokens of sampling requests.")
QUEUED_OPERATIONS = Gauge(
    "tinkercloud_queued_operations", "Training operations waiting in model queues."
)
PENDING_SAMPLES = Gauge("tinkercloud_pending_samples", "Sampling requests accepted, not settled.")
LOADED_MODELS = Gauge("tinkercloud_loaded_models", "Models with a trainer slot.")
UNIT_SECONDS = Histogram(
    "tinkercloud_unit_seconds", "Time of one trainer call.", ("kind",), buckets=_LATENCY_BUCKETS_S
)
UNIT_OPERATIONS = Histogram(
    "tinkercloud_unit_operations",
    "Operations that shared one trainer call.",
    ("kind",),
    buckets=(1, 2, 4, 8, 16, 32, 64, 128),
)
QUEUE_WAIT_SECONDS = Histogram(
    "tinkercloud_queue_wait_seconds",
    "From arrival to the start of the trainer call.",
    ("kind",),
    buckets=_LATENCY_BUCKETS_S,
)
