"""REST, SSE, authentication, tenants and keys: the only HTTP entrance."""
