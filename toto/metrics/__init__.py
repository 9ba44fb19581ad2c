"""What a Prometheus is told of toto and its fleet: docs/monitoring.md lists it. It is a part of `toto.server.app`."""
