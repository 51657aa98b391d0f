"""What to run: models, builds, configs, workloads and the cases they make."""
