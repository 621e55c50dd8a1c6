"""The drivers of a kernel, built in or modules, and the devices they bind to."""
