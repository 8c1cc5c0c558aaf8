"""The typed configuration: schema, loading, description."""
