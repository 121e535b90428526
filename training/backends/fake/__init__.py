"""A real but tiny model in numpy behind the backend interface: tests and load tests of the rest."""

from training.backends.fake.backend import FakeBackend

__all__ = ["FakeBackend"]
