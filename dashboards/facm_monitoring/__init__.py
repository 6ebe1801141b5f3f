"""Grafana dashboards of the platform, as code: ``python -m facm_monitoring`` writes them."""
