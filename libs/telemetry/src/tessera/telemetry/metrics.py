"""Every Prometheus metric of Tessera, with its meaning. Nothing else may define one.

No label may hold a tenant, a user or a text: labels are few and known. Times are in seconds, sizes in bytes.
"""

from prometheus_client import Gauge

# --- every service
SERVICE_INFO = Gauge("tessera_service_info", "Always 1; names the service and the replica that answers.", ["service", "instance"])
DEPENDENCY_UP = Gauge("tessera_dependency_up", "1 when the last health check of the dependency passed, else 0.", ["dependency"])
BREAKER_OPEN = Gauge("tessera_breaker_open", "0 closed, 0.5 half open, 1 open: the breaker in front of the dependency.", ["dependency"])
