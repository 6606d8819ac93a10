"""Where the gateway meets Kafka, Postgres and the object store."""
