"""Server processes and HTTP: launch, readiness, supervision, shutdown, client."""
