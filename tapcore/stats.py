"""Counters and latency histograms of one disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tapcore.request import OP_NAMES, Request

BUCKETS = 48 * 4


def bucket_of(latency_ns: int) -> int:
    """The histogram bucket of a latency: four buckets to a power of two of nanoseconds."""
    bits = latency_ns.bit_length()
    if bits < 3:
        return latency_ns
    return min((bits - 2) * 4 + ((latency_ns >> (bits - 3)) & 3), BUCKETS - 1)


def bucket_end_ns(bucket: int) -> int:
    """The first latency beyond `bucket`, in nanoseconds."""
    if bucket < 4:
        return bucket + 1
    power, quarter = divmod(bucket, 4)
    return (4 + quarter + 1) << (power - 1)


class Stats:
    """By op (as in `request.OP_NAMES`): requests completed, bytes moved, failures, and latencies."""

    def __init__(self) -> None:
        self.requests = [0] * len(OP_NAMES)
        self.bytes = [0] * len(OP_NAMES)
        self.errors = [0] * len(OP_NAMES)
        self.retries = 0
        self.merged = 0
        self.stalls = 0
        self.latencies = [[0] * BUCKETS for _ in OP_NAMES]

    def count(self, finished: Sequence[Request], latency_ns: int) -> None:
        """Account for requests that ended well, all with the same latency (a batch ends as one)."""
        requests, moved = self.requests, self.bytes
        bucket = bucket_of(latency_ns)
        latencies = self.latencies
        for request in finished:
            op = request.op
            requests[op] += 1
            moved[op] += request.length
            latencies[op][bucket] += 1

    def percentile_us(self, op: int, fraction: float) -> float:
        """The latency in microseconds that `fraction` of the op's requests stayed below (bucket end)."""
        histogram = self.latencies[op]
        left = sum(histogram) * fraction
        for bucket, count in enumerate(histogram):
            left -= count
            if count and left <= 0:
                return bucket_end_ns(bucket) / 1000
        return 0.0

    def as_dict(self) -> dict[str, Any]:
        ops = {
            name: {
                "requests": self.requests[op],
                "bytes": self.bytes[op],
                "errors": self.errors[op],
                "latency_us": {
                    "p50": self.percentile_us(op, 0.5),
                    "p99": self.percentile_us(op, 0.99),
                    "p99.9": self.percentile_us(op, 0.999),
                },
                "histogram_ns": {
                    str(bucket_end_ns(bucket)): count
                    for bucket, count in enumerate(self.latencies[op])
                    if count
                },
            }
            for op, name in enumerate(OP_NAMES)
        }
        return {"ops": ops, "retries": self.retries, "merged": self.merged, "stalls": self.stalls}
