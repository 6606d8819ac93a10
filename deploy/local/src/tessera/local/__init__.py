"""The stack on one machine without Docker: Kafka, Postgres, Redis and the services."""
