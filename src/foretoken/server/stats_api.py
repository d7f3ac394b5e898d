"""Routes for those who watch: /metrics for Prometheus, /stats for the page."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from foretoken.server.metrics import Load, ServerMetrics


def metrics_router(metrics: ServerMetrics, load: Load) -> APIRouter:
    """Return the routes.

    Args:
        metrics: What was counted.
        load: Who knows how busy the server is: its engine thread.
    """
    metrics.follow(load)
    router = APIRouter()

    @router.get("/metrics", response_class=Response, tags=["watch"])
    def show_metrics(request: Request) -> Response:
        """All metrics, as Prometheus' text or, if the request accepts it, as OpenMetrics."""
        content, content_type = metrics.encode(request.headers.get("accept", ""))
        return Response(content, media_type=content_type)

    @router.get("/stats", tags=["watch"])
    def show_stats() -> dict[str, Any]:
        """What happened in the last ten seconds, and what is going on."""
        return recent_stats(metrics, load)

    return router


def recent_stats(metrics: ServerMetrics, load: Load) -> dict[str, Any]:
    """Return the last seconds' figures for JSON; null where nothing is known of them."""
    totals, seconds = metrics.meter.recent()
    num_tokens = totals.num_tokens
    return {
        "window_s": _rounded(seconds),
        "num_tokens": num_tokens,
        "tokens_per_s": _rounded(num_tokens / seconds if seconds else None),
        "tokens_per_step": _rounded(totals.tokens_per_request_step),
        "speedup": _rounded(totals.speedup),
        "acceptance_by_depth": [round(rate, 4) for rate in totals.acceptance_by_depth],
        "accepted_by": {name: count for name, count in totals.accepted_by.items() if count},
        "drafter_share": _rounded(totals.drafter_share),
        "wasted_row_share": _rounded(totals.wasted_row_share),
        "num_running": load.num_running,
        "num_waiting": load.num_waiting,
        "kv_used_share": _rounded(load.kv_used_share),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


__all__ = ["metrics_router", "recent_stats"]
