"""The test of the API contract: generated requests and hostile ones, against a service with its own process."""
